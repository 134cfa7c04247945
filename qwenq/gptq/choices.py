"""The choices that decide a quantised model's quality, in one line for the user: what, and why."""

from __future__ import annotations

from qwenq.gptq.rows import Settings

_SCALE_SEARCH = {
    "hessian": "hessian (least error weighted by what the inputs make of it)",
    "mse": "mse (least squared error, all columns alike)",
    "none": "none (from the largest weight of a group)",
}


def describe(settings: Settings) -> str:
    """Every choice with its reason, separated by semicolons."""
    parts = [
        f"Int{settings.bits}, symmetric (the zero point in the middle: every kernel loads it)"
        if settings.sym
        else f"Int{settings.bits}, asymmetric (each group has its own zero point, stored as gptq_v2: "
        "some kernels do not load it)",
        "act-order with static groups (important columns first, stored in file order: every kernel loads it)"
        if settings.act_order
        else "no act-order (columns as they come)",
        f"scale search: {_SCALE_SEARCH[settings.scale_search]}",
        f"{settings.drift:.0%} of inherited error made good (aims at the original model's outputs)"
        if settings.drift
        else "no inherited error made good (plain GPTQ)",
        "then integers and scales refined by turns (descends further on GPTQ's objective)"
        if settings.refine
        else "no refinement after GPTQ",
        f"damping {settings.damp:g} of the Hessian's mean diagonal (raised where that cannot be inverted)",
    ]
    return "; ".join(parts)
