"""The check against oracles: transformers' whole models in float64, and plain formulas."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwenq.compute.grid import round_to_nearest
from qwenq.errors import CorruptFileError, UnsupportedError, UsageError
from qwenq.evals.check import (
    MODULE_TOKENS,
    ROWS,
    CheckResult,
    ModuleError,
    check,
    chosen_sequences,
    compare_logits,
    compare_slab,
    module_error,
    require_comparable,
)
from qwenq.events import Advance, Event
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import DequantisedSource, pack

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # far from uniform logits
}


def write_base(folder: Path, kind: str, *, tied: bool) -> Path:
    """A random model, saved by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def write_quantised(folder: Path, base: Path, quant: QuantConfig, noise: float = 0.0) -> Path:
    """Every linear of the blocks rounded, after noise, on a plain min/max grid by a packer of this test."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    for name, tensor in load_file(base / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = tensor
            continue
        noisy = tensor + noise * torch.randn(tensor.shape, generator=generator)
        packed = round_and_pack(noisy, quant)
        tensors |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in packed.items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = quant.to_config_json()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def round_and_pack(weight: Tensor, quant: QuantConfig) -> dict[str, Tensor]:
    size = weight.shape[1] if quant.group_size == -1 else quant.group_size
    grouped = weight.unflatten(1, (-1, size))
    middle = 2 ** (quant.bits - 1)
    scales = (grouped.abs().amax(-1) / (middle - 1)).half()
    integers = (grouped / scales[..., None].float()).round().add(middle).clamp(0, 2 * middle - 1)
    zeros = torch.full(scales.shape, middle, dtype=torch.uint8)
    packed = pack(integers.flatten(1).to(torch.uint8), scales, zeros, quant.bits)
    return {part: getattr(packed, part) for part in ("qweight", "qzeros", "scales", "g_idx")}


def nearest(weight: Tensor, quant: QuantConfig) -> Tensor:
    return round_to_nearest(weight, quant.bits, quant.group_size, sym=quant.sym)


CASES = {
    "llama, tied, 4 bits": ("llama", True, QuantConfig(bits=4, group_size=16)),
    "qwen2, biases, 8 bits": ("qwen2", False, QuantConfig(bits=8, group_size=-1)),
    "qwen3, norms, 4 bits": ("qwen3", False, QuantConfig(bits=4, group_size=32)),
}


class Case:
    def __init__(self, folder: Path, kind: str, tied: bool, quant: QuantConfig) -> None:
        self.base_folder = write_base(folder / "base", kind, tied=tied)
        self.quantised_folder = write_quantised(folder / "quantised", self.base_folder, quant)
        self.quant = quant
        self.tokens = torch.randint(
            0, SIZES["vocab_size"], (5, 40), generator=torch.Generator().manual_seed(2)
        )
        self.base, self.quantised = (open_checkpoint(f) for f in (self.base_folder, self.quantised_folder))
        self.result = self.check()

    def check(self, **changes: Any) -> CheckResult:
        settings = {"device": "cpu", "dtype": torch.float32} | changes
        return check(self.quantised, self.base, self.tokens, **settings)

    @cached_property
    def oracles(self) -> tuple[Any, Any]:
        """Both models whole, by transformers, in float64."""
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(self.base_folder, dtype=torch.float64)
        quantised = AutoModelForCausalLM.from_pretrained(self.base_folder, dtype=torch.float64)
        source = DequantisedSource(self.quantised.source, self.quant, torch.float64)
        missing = quantised.load_state_dict(
            {n: source.read(n).double() for n in source.names()}, strict=False
        )
        assert set(missing.missing_keys) <= {"lm_head.weight"} and not missing.unexpected_keys
        return base, quantised


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), *CASES[request.param])


@torch.inference_mode()
def test_divergence_is_that_of_whole_models_in_float64(case: Case) -> None:
    base, quantised = case.oracles
    p, q = (model(case.tokens).logits[:, :-1].log_softmax(-1) for model in (base, quantised))
    kl = (p.exp() * (p - q)).sum(-1)  # [sequences, tokens - 1]
    result = case.result
    assert result.kl.value > 1e-5  # there is something to measure
    assert result.kl.value == pytest.approx(float(kl.mean()), rel=1e-3, abs=2e-6)
    assert result.kl_median == pytest.approx(float(kl.quantile(0.5)), rel=1e-3, abs=2e-6)
    assert result.kl_p999 == pytest.approx(float(kl.quantile(0.999)), rel=1e-3, abs=2e-6)
    assert result.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-3, abs=2e-6)
    for part in result.kl_by_position:  # after the first token: one read, none left out
        expected = float(kl[:, part.first - 1 : part.last].mean())
        assert part.mean.value == pytest.approx(expected, rel=1e-3, abs=2e-6)
    assert [part.first for part in result.kl_by_position[1:]] == [
        part.last + 1 for part in result.kl_by_position[:-1]
    ]
    assert (result.kl_by_position[0].first, result.kl_by_position[-1].last) == (1, 39)
    assert sum(part.n for part in result.kl_by_position) == kl.numel()
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert result.same_top.value == pytest.approx(float(same), abs=1.01 / kl.numel())
    for count, found in ((5, result.top5), (10, result.top10)):
        shared = [
            len(set(a.topk(count).indices.tolist()) & set(b.topk(count).indices.tolist())) / count
            for a, b in zip(p.flatten(0, 1), q.flatten(0, 1), strict=True)
        ]
        assert found.value == pytest.approx(sum(shared) / len(shared), abs=0.5 / kl.numel())
    assert (result.sequences, result.seq_len, result.tokens) == (5, 40, 5 * 39)


@torch.inference_mode()
def test_perplexities_are_transformers_losses(case: Case) -> None:
    base, quantised = (float(m(case.tokens, labels=case.tokens).loss.exp()) for m in case.oracles)
    assert case.result.base_perplexity == pytest.approx(base, rel=1e-5)
    assert case.result.perplexity == pytest.approx(quantised, rel=1e-5)
    ratio = case.result.perplexity_ratio
    assert ratio.value == pytest.approx(quantised / base, rel=1e-5)
    assert ratio.low is not None and ratio.high is not None and ratio.low < ratio.value < ratio.high


@torch.inference_mode()
def test_module_errors_are_those_of_the_base_models_inputs(case: Case) -> None:
    base, quantised = case.oracles
    inputs: dict[str, Tensor] = {}
    linears = {n: m for n, m in base.named_modules() if n.endswith("proj")}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, module in linears.items()
    ]
    base(case.tokens)
    for handle in handles:
        handle.remove()
    assert [row.name for row in case.result.modules] and {r.name for r in case.result.modules} == set(linears)
    for row in case.result.modules:
        W, Q, x = linears[row.name].weight, quantised.get_submodule(row.name).weight, inputs[row.name]
        R = nearest(W.float(), case.quant).double()
        energy = (x @ W.T).square().sum()
        assert row.error == pytest.approx(float((x @ (W - Q).T).square().sum() / energy), rel=1e-3)
        assert row.rtn_error == pytest.approx(float((x @ (W - R).T).square().sum() / energy), rel=1e-3)
    assert case.result.module_tokens == case.tokens.numel()


def test_results_do_not_depend_on_batches_and_slabs(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenq.evals.check.TOKENS_PER_BATCH", 80)
    monkeypatch.setattr("qwenq.evals.check.SLAB_TOKENS", 7)
    steps: list[tuple[int, int]] = []

    def listener(event: Event) -> None:
        if isinstance(event, Advance) and event.done is not None and event.total is not None:
            steps.append((event.done, event.total))

    other = case.check(listener=listener)
    assert other.kl.value == pytest.approx(case.result.kl.value, rel=1e-3, abs=1e-6)
    assert other.perplexity == pytest.approx(case.result.perplexity, rel=1e-5)
    for ours, theirs in zip(other.modules, case.result.modules, strict=True):
        assert ours.error == pytest.approx(theirs.error, rel=1e-3)
    assert steps == [(done, 2 + 3) for done in range(1, 6)]  # 2 blocks, 3 batches


def test_a_model_compared_with_itself_has_zero_divergence(case: Case) -> None:
    """The dequantised weights as base: only the integers' own figures remain, and they are perfect."""
    source = DequantisedSource(case.quantised.source, case.quant, torch.float32)
    config = {k: v for k, v in case.quantised.config.items() if k != "quantization_config"}
    result = check(
        case.quantised, replace(case.base, source=source, config=config), case.tokens,
        device="cpu", dtype=torch.float32,
    )  # fmt: skip
    assert result.kl.value < 1e-6 and result.same_top.value == 1.0
    assert result.top5.value == result.top10.value == 1.0
    assert result.perplexity_ratio.value == pytest.approx(1.0, abs=1e-6)
    assert all(row.error == 0 for row in result.modules)
    assert result.verdict.word == "none"  # of so few tokens, whatever they say
    assert "tokens are too few to judge by" in result.verdict.sentence


def test_json_is_strict_and_whole(case: Case) -> None:
    plain = json.loads(json.dumps(case.result.to_json(), allow_nan=False))
    assert plain["kl"]["value"] == case.result.kl.value
    assert plain["verdict"]["word"] == case.result.verdict.word and plain["broken"] is case.result.broken
    assert len(plain["modules"]) == 14 and set(plain["modules"][0]) == {"name", "error", "rtn_error"}
    assert plain["dtype"] == "float32" and plain["bits"] == case.quant.bits
    assert set(plain) == set(vars(case.result)) | {"broken"}


def test_errors_of_a_mixture_are_told_by_part_and_experts_do_not_hide_attention(case: Case) -> None:
    assert case.result.errors_by_part().keys() == {"self_attn", "mlp"}
    assert "by part" not in case.result.summary()
    experts = [f"model.layers.0.mlp.experts.{number}.up_proj" for number in range(30)]
    modules = (
        ModuleError("model.layers.0.linear_attn.out_proj", 0.3, 0.4),
        *(ModuleError(name, 0.1, 0.2) for name in experts),
        ModuleError("model.layers.0.mlp.shared_expert.up_proj", 0.2, 0.3),
    )
    said = replace(case.result, modules=modules).summary()
    assert "error on held-out text 20.000% of the output, round-to-nearest 30.000%" in said["modules"]
    shown = (
        "linear_attn 30.000% (40.000%), mlp.experts 10.000% (20.000%), mlp.shared_expert 20.000% (30.000%)"
    )
    assert said["by part"].endswith(shown)


def test_noisy_weights_are_broken(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", tied=False)
    quantised = write_quantised(tmp_path / "q", base, QuantConfig(bits=4, group_size=32), noise=2.0)
    tokens = torch.arange(60).reshape(2, 30)
    result = check(
        open_checkpoint(quantised), open_checkpoint(base), tokens, device="cpu", dtype=torch.float32
    )
    assert result.broken and result.verdict.word == "broken"


def test_one_sequence_has_no_interval(case: Case) -> None:
    result = check(case.quantised, case.base, case.tokens[:1], device="cpu", dtype=torch.float32)
    assert result.kl.low is None and result.kl.high is None and np.isfinite(result.kl.value)


def test_a_padded_mlp_is_held_against_its_narrower_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "qwen2", tied=False)
    narrow = open_checkpoint(base)
    wide = tmp_path / "wide"
    wide.mkdir()
    tensors = {name: narrow.read(name) for name in narrow.names()}
    for name in (name for name in tensors if ".mlp." in name):
        more = 96 - narrow.config["intermediate_size"]
        sides = (0, more) if name.endswith("down_proj.weight") else (0, 0, 0, more)
        tensors[name] = torch.nn.functional.pad(tensors[name], sides)
    save_file(tensors, wide / "model.safetensors")
    config = json.loads((base / "config.json").read_text()) | {"intermediate_size": 96}
    (wide / "config.json").write_text(json.dumps(config))
    quantised = write_quantised(tmp_path / "q", wide, QuantConfig(bits=8, group_size=32))
    tokens = torch.arange(60).reshape(2, 30)
    against = [
        check(open_checkpoint(quantised), open_checkpoint(b), tokens, device="cpu", dtype=torch.float32)
        for b in (base, wide)
    ]
    assert against[0].kl.value == pytest.approx(against[1].kl.value, abs=1e-6)
    assert against[0].kl.value < 0.05
    assert {m.name.split(".")[3] for m in against[0].modules} == {"self_attn"}


def with_config(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    return replace(checkpoint, config=checkpoint.config | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 98}, "vocab_size is 97"),
        ({"hidden_size": 64}, "hidden_size"),
        ({"model_type": "mistral"}, "model_type"),
        ({"intermediate_size": 65}, "intermediate_size"),
        ({"quantization_config": {"bits": 4}}, "itself quantised"),
        ({"qwenq_random_weights": {"seed": 0}}, "random weights"),
    ],
)
def test_another_base_is_refused(case: Case, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        require_comparable(case.quantised, with_config(case.base, **changes))


def test_what_is_not_gptq_is_refused(case: Case) -> None:
    with pytest.raises(UsageError, match="not quantised"):
        require_comparable(case.base, case.base)
    with pytest.raises(UnsupportedError, match="awq"):
        require_comparable(
            with_config(case.quantised, quantization_config={"quant_method": "awq"}), case.base
        )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(0, 9, dtype=torch.int64), "at least 2 tokens"),
        (torch.zeros(3, 1, dtype=torch.int64), "at least 2 tokens"),
        (torch.full((1, 4), 97), "id 97"),
        (torch.full((1, 4), -1), "id -1"),
    ],
)
def test_tokens_that_cannot_be_scored_are_refused(case: Case, tokens: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(case.quantised, case.base, tokens, device="cpu", dtype=torch.float32)


def test_scales_that_are_not_finite_are_named(case: Case, tmp_path: Path) -> None:
    tensors = load_file(case.quantised_folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales"][0, 0] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((case.quantised_folder / "config.json").read_text())
    with pytest.raises(CorruptFileError, match=r"layers\.1\.mlp\.up_proj"):
        check(open_checkpoint(tmp_path), case.base, case.tokens, device="cpu", dtype=torch.float32)


def test_one_block_is_in_memory_at_a_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[BlockwiseDecoder] = []
    filled: list[int] = []
    start, forward = BlockwiseDecoder.__init__, BlockwiseDecoder.forward

    def spy_start(self: BlockwiseDecoder, *args: Any) -> None:
        start(self, *args)
        made.append(self)

    def spy_forward(self: BlockwiseDecoder, *args: Any) -> Tensor:
        blocks = [block for decoder in made for block in decoder.blocks]
        filled.append(sum(not next(block.parameters()).is_meta for block in blocks))
        return forward(self, *args)

    monkeypatch.setattr(BlockwiseDecoder, "__init__", spy_start)
    monkeypatch.setattr(BlockwiseDecoder, "forward", spy_forward)
    case.check()
    assert filled == [1] * 4  # two models of two blocks


@pytest.mark.parametrize(("sequences", "tokens"), [(8, 512), (32, 512), (1, 4096), (3, 300), (2000, 2)])
def test_whole_sequences_are_chosen_evenly(sequences: int, tokens: int) -> None:
    chosen = chosen_sequences(sequences, tokens)
    assert chosen == sorted(set(chosen)) and chosen[0] == 0 and chosen[-1] < sequences
    assert len(chosen) == 1 or len(chosen) * tokens <= MODULE_TOKENS
    assert len(chosen) == sequences or (len(chosen) + 1) * tokens > MODULE_TOKENS


# Compare predictions.


def shared(p: torch.Tensor, q: torch.Tensor, count: int) -> torch.Tensor:
    """Return the overlap of the likeliest tokens by sets."""
    tops = [[set(row.topk(count).indices.tolist()) for row in logs] for logs in (p, q)]
    return torch.tensor([len(a & b) / count for a, b in zip(*tops, strict=True)], dtype=torch.float64)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10**6), spread=st.sampled_from([0.1, 3.0, 100.0]), gap=st.sampled_from([0, 0.01, 1.0])
)
def test_against_float64(seed: int, spread: float, gap: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(6, 500, generator=generator) * spread + 50
    b = a + torch.randn(6, 500, generator=generator) * gap * spread
    targets = torch.randint(0, 500, (6,), generator=generator)
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    expected = torch.stack(
        [
            (p.exp() * (p - q)).sum(-1),
            (a.argmax(-1) == b.argmax(-1)).double(),
            -q.gather(1, targets[:, None])[:, 0],
            -p.gather(1, targets[:, None])[:, 0],
            *(shared(p, q, count) for count in (5, 10)),
        ]
    )
    found = compare_logits(a.clone(), b.clone(), targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert bool((found[0] >= 0).all())


def test_logits_that_are_not_finite_show() -> None:
    a, b = torch.zeros(1, 4), torch.zeros(1, 4)
    b[0, 1] = torch.nan
    assert bool(compare_logits(a, b, torch.zeros(1, dtype=torch.int64))[0].isnan())


def test_extreme_logits_do_not_overflow() -> None:
    a = torch.tensor([[0.0, 1e4, -1e4]])
    b = torch.tensor([[1e4, 0.0, -1e4]])
    assert compare_logits(a, b, torch.tensor([0])).squeeze(1).tolist() == [1e4, 0, 0, 1e4, 1, 1]


def test_tokens_keep_their_order_however_many_are_compared_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2 * ROWS + 7, 50, generator=generator) for _ in range(2))
    targets = torch.randint(0, 50, (len(a),), generator=generator)
    found = compare_slab(a.clone(), b.clone(), targets)
    torch.testing.assert_close(found, compare_logits(a, b, targets), rtol=1e-6, atol=1e-6)


# Errors of modules.


def test_errors_are_shares_of_the_outputs_energy() -> None:
    generator = torch.Generator().manual_seed(0)
    W, x = torch.randn(6, 8, generator=generator), torch.randn(20, 8, generator=generator)
    row = module_error("m", W, W * 0.9, x, QuantConfig(bits=4, group_size=8))
    assert row.error == pytest.approx(0.01, rel=1e-4)
    assert 0 < row.rtn_error < 0.05
    assert module_error("m", torch.zeros_like(W), torch.zeros_like(W), x, QuantConfig()).error == 0


def test_inputs_in_bfloat16_give_the_same_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(96, 256, generator=generator) * torch.rand(256, generator=generator).square()
    x = torch.randn(300, 256, generator=generator)
    x[:, ::50] *= 100  # as activations are: a few columns hold most of the energy
    x = x.bfloat16()
    quant = QuantConfig(bits=4, group_size=64)
    Q = nearest(W, quant) * 1.01
    row, exact = module_error("m", W, Q, x, quant), x.double()
    energy = (exact @ W.double().T).square().sum()
    for share, other in ((row.error, Q), (row.rtn_error, nearest(W, quant))):
        assert share == pytest.approx(
            float((exact @ (W - other).double().T).square().sum() / energy), rel=1e-3
        )
