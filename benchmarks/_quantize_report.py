"""The report of quantize_vs_peers.py: its ratios, and its table for people."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from _common import markdown_table, measured_on, turns_of

QWENQ, GPTQMODEL, LLMCOMPRESSOR, ROUND_TO_NEAREST = "qwenq", "GPTQModel", "llm-compressor", "round to nearest"
AUTOROUND, AUTOROUND_LIGHT = "AutoRound", "AutoRound light"


@dataclass(frozen=True)
class Peer:
    """A contender other than qwenq.

    Attributes:
        package: its distribution, which names the script that runs it, too.
        target: of the Makefile, which makes its environment.
        key: what its ratios are called after.
        arguments: of its script, besides those of all.
    """

    package: str
    target: str
    key: str
    arguments: tuple[str, ...] = ()


PEERS = {
    GPTQMODEL: Peer("gptqmodel", "interop", "gptqmodel"),
    LLMCOMPRESSOR: Peer("llmcompressor", "llmcompressor", "llmcompressor"),
    AUTOROUND: Peer("auto_round", "autoround", "autoround", ("200",)),
    AUTOROUND_LIGHT: Peer("auto_round", "autoround", "autoround_light", ("50",)),
}
"""AutoRound's number is that of the steps for a block: 200 are its default, 50 its recipe `light`."""
PHASES = {"calibration": "reading the tokens", "layers": "layers", "write": "writing", "check": "the check"}
"""Of a run of qwenq, as its JSON names them, in words."""
JUDGED = {"gap": "perplexity", "gap_without_unk": "perplexity_without_unk", "kl": "kl"}
"""Ratios of quality, and whose they are. An old report has perplexity alone."""
HEADS = {"perplexity": "added", "perplexity_without_unk": "added without `<unk>`", "kl": "KL"}
BEYOND = (
    "In that text `<unk>` stands for a rare word. KL: divergence of each one's next-token distributions from "
    "the unquantised model's, nats a token. "
)


def middle(rows: list[dict[str, Any]], tool: str, key: str) -> float:
    """Median over a tool's turns."""
    return float(median(row[key] for row in rows if row["tool"] == tool))


def seconds_of_check(rows: list[dict[str, Any]]) -> list[float]:
    """Return the seconds of qwenq's check by turn; its peers have no such step."""
    return [row["phases_s"]["check"] for row in rows if row["tool"] == QWENQ]


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Qwenq's medians over each peer's; a gap is the perplexity above the unquantised model's."""
    tools, base = {row["tool"] for row in rows}, rows[0]
    found: dict[str, float] = {}
    for peer, its in PEERS.items():
        if {QWENQ, peer} <= tools:
            judged = {name: key for name, key in JUDGED.items() if key in rows[1]}
            pairs = {
                name: [middle(rows, tool, key) - base.get(key, 0.0) for tool in (QWENQ, peer)]
                for name, key in {"time": "wall_s", **judged, "memory": "peak_rss_mib"}.items()
            }
            ours, theirs = pairs["time"]
            pairs["time_without_check"] = [ours - median(seconds_of_check(rows)), theirs]
            found |= {f"{name}_vs_{its.key}": round(a / b, 3) for name, (a, b) in pairs.items()}
    return found


def table(rows: list[dict[str, Any]], found: dict[str, float], facts: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    said, beyond = comparison(found, facts), BEYOND if "kl" in rows[1] else ""
    return (
        f"# Quantising: qwenq beside its peers\n\n{lines(rows)}\n"
        + (f"{said}\n\n" if said else "")
        + (f"{whereabouts(rows)}\n\n" if any(row["tool"] == QWENQ for row in rows) else "")
        + f"{facts['model']}, Int{facts['bits']}, group size {facts['group_size']}; calibrated on "
        f"{facts['calibration']} tokens; evaluated on {facts['evaluation']} tokens, the text as it is, in "
        f"float32 with dequantised weights. {beyond}Seconds are those of the whole command, "
        f"{turns_of(facts)}. {facts['cpu']}, {facts['threads']} threads; "
        f"torch {facts['versions'].get('torch')}; {peers_of(facts)} with their "
        f"defaults; {measured_on(rows, facts)}.\n"
    )


def peers_of(facts: dict[str, Any]) -> str:
    """All that were raced, with their versions."""
    named = {its.package: peer for peer, its in reversed(PEERS.items()) if f"versions_{its.package}" in facts}
    return " and ".join(version_of(peer, facts) for peer in reversed(named.values()))


def lines(rows: list[dict[str, Any]]) -> str:
    """Return the table: medians over the turns, with the fastest and the slowest of several."""
    base = rows[0]
    several = max(row.get("turn", 1) for row in rows) > 1
    judged = [key for key in JUDGED.values() if key in rows[1]]
    heads = [HEADS[key] for key in judged]
    body = [["unquantised", "", *([""] * several), "", f"{base['perplexity']:.2f}", *([""] * len(judged))]]
    for tool in dict.fromkeys(row["tool"] for row in rows[1:]):
        walls = [row["wall_s"] for row in rows if row["tool"] == tool]
        seconds = [f"{median(walls):.1f}", *([f"{min(walls):.1f}–{max(walls):.1f}"] * several)]
        peak, found = f"{middle(rows, tool, 'peak_rss_mib'):.0f}", f"{middle(rows, tool, 'perplexity'):.2f}"
        more = {key: middle(rows, tool, key) - base.get(key, 0.0) for key in judged}
        added = [f"{value:.4f}" if key == "kl" else f"{value:.2f}" for key, value in more.items()]
        body.append([tool, *seconds, peak, found, *added])
    return markdown_table(["", "seconds", *(["range"] * several), "peak MiB", "perplexity", *heads], body)


def comparison(found: dict[str, float], facts: dict[str, Any]) -> str:
    """Return the ratios in words; nothing of a peer that was not measured."""
    said = []
    for peer, its in PEERS.items():
        if f"time_vs_{its.key}" in found:
            time, bare, memory, added = (
                f"{found[f'{name}_vs_{its.key}']:.2f}"
                for name in ("time", "time_without_check", "memory", "gap")
            )
            said.append(
                f"qwenq beside {version_of(peer, facts)}: {time} of its time ({bare} without the check, "
                f"which it does not have), {memory} of its memory, {added} of the perplexity that it added"
                f"{_beyond(found, its.key)}."
            )
    return " ".join(said)


def _beyond(found: dict[str, float], key: str) -> str:
    """Return what perplexity alone does not show, where it was measured."""
    if f"kl_vs_{key}" not in found:
        return ""
    unmarked, divergence = (found[f"{name}_vs_{key}"] for name in ("gap_without_unk", "kl"))
    return f" ({unmarked:.2f} without the text's marks `<unk>`), {divergence:.2f} of its KL divergence"


def version_of(peer: str, facts: dict[str, Any]) -> str:
    """Name and version."""
    package = PEERS[peer].package
    return f"{peer} {facts[f'versions_{package}'].get(package)}"


def whereabouts(rows: list[dict[str, Any]]) -> str:
    """Where qwenq's own seconds go: medians of its phases, and what is outside all of them."""
    ours = [row for row in rows if row["tool"] == QWENQ]
    phases = {name: float(median(row["phases_s"][name] for row in ours)) for name in PHASES}
    rest = middle(rows, QWENQ, "wall_s") - sum(phases.values())
    parts = [f"{PHASES[name]} {seconds:.1f}" for name, seconds in phases.items()]
    return (
        f"Where qwenq's seconds go: {', '.join(parts)}, starting Python, imports, fingerprint and exit "
        f"{rest:.1f}. What a layer does: [quantize_profile.md](quantize_profile.md)."
    )
