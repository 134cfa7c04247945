"""A mixture of experts whose activations are real: the MLPs of a dense model, cut into experts.

    python benchmarks/_mixture.py MODEL TEXT.jsonl OUT EXPERTS ACTIVE WIDTH

MODEL is a folder of Llama's or Qwen2's architecture, TEXT has a ``text`` a line, of which the last lines are
read; each MLP becomes EXPERTS experts of WIDTH channels, of which a token uses ACTIVE. Layer by layer, on the
hidden states of the mixture so far:

- the MLP's channels that contribute most energy make the shared expert, which every token uses;
- the others are clustered by co-activation, into experts of one width;
- the router is fitted on the experts' inputs: by ridge regression to the norms of their outputs, then by
  gradient descent on the error that leaving experts out makes in the MLP's output.

The layout is Qwen2-MoE's: its block is that of Qwen3-MoE and a shared expert, its tensors have the same names
for each expert, and its attention is Qwen2's, or Llama's where ``qkv_bias`` is false. (Qwen3-MoE normalises
queries and keys, which no value of its weights undoes.) The shared expert's gate is a sigmoid of zero, one
half, and its ``down_proj`` doubled: both powers of two. The last line of the output is JSON: the share of the
routed channels' output energy that each block's mixture loses.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLES, SEQ_LEN = 12, 512
CLUSTERED = 1024  # tokens of which the clusters are made
ROUNDS, STEPS, RATE, PER_STEP = 4, 80, 4e-3, 1024  # of clustering, and of the router's fit
RIDGE = 0.03  # of the mean diagonal


@dataclass(frozen=True)
class Shape:
    """The number of experts, how many of them a token uses, and the channels of each."""

    experts: int
    active: int
    width: int


@dataclass(frozen=True)
class Dense:
    """A gated MLP's weights, float32: gate and up [channels, hidden], down [hidden, channels]."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def inner(self, x: Tensor) -> Tensor:
        """Return the input of ``down``, [tokens, channels]."""
        return nn.functional.silu(x @ self.gate.T) * (x @ self.up.T)

    def part(self, channels: Tensor, scale: float) -> dict[str, Tensor]:
        """Return an expert of some channels, its outputs times ``scale``."""
        down = self.down[:, channels] * scale
        return {"gate_proj": self.gate[channels], "up_proj": self.up[channels], "down_proj": down}


def clusters(inner: Tensor, count: int) -> Tensor:
    """Return channels by cluster, [count, channels / count]: those that are active on the same tokens.

    Args:
        inner: [tokens, channels], what each channel contributes.
        count: how many clusters, all of one size.
    """
    profile = inner.abs()
    profile = profile / profile.norm(dim=0)
    profile = (profile - profile.mean(1, keepdim=True)).T.contiguous()  # [channels, tokens]
    size = len(profile) // count
    centres = profile[torch.randperm(len(profile), generator=torch.Generator().manual_seed(0))[:count]]
    for _ in range(ROUNDS):
        near = centres @ profile.T
        _, column = linear_sum_assignment(-near.repeat_interleave(size, 0).numpy())
        members = torch.from_numpy(column).view(count, size)
        centres = nn.functional.normalize(profile[members].mean(1), dim=1)
    return members


def route(x: Tensor, router: Tensor, active: int) -> Tensor:
    """Return the weight of each expert for each token, [tokens, experts]; zero where it is not chosen."""
    share = torch.softmax(x @ router.T, -1)
    top = share.topk(active, -1)
    return torch.zeros_like(share).scatter(1, top.indices, top.values / top.values.sum(-1, keepdim=True))


def fit_router(x: Tensor, outputs: Tensor, active: int) -> tuple[Tensor, float, float]:
    """Return the router, [experts, hidden], the scale of the experts' sum, and the share of energy lost.

    Args:
        x: [tokens, hidden], the experts' input.
        outputs: [tokens, experts, experts], inner products of the experts' outputs for a token.
        active: experts that a token uses.
    """
    norms = outputs.diagonal(dim1=1, dim2=2).sqrt()
    target = (norms - norms.mean(0)) / norms.mean()
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    router = torch.linalg.solve(gram, x.T @ target).T.contiguous().requires_grad_()
    wanted, energy = outputs.sum(2), outputs.sum((1, 2))
    order, optimiser = torch.Generator().manual_seed(0), torch.optim.Adam([router], RATE)

    def lost(some: Tensor) -> tuple[Tensor, Tensor]:
        weights = route(x[some], router, active)
        ours, theirs = (
            ((outputs[some] @ weights[..., None])[..., 0] * weights).sum(),
            (wanted[some] * weights).sum(),
        )
        scale = (theirs / ours).detach()
        return (scale * scale * ours - 2 * scale * theirs) / energy[some].sum() + 1, scale

    for _ in range(STEPS):
        loss, _ = lost(torch.randint(len(x), (PER_STEP,), generator=order))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        loss, scale = lost(torch.arange(len(x)))
    return router.detach(), float(scale), float(loss)


def cut(x: Tensor, mlp: Dense, shape: Shape) -> tuple[dict[str, Tensor], Tensor, float]:
    """Return the tensors of a mixture in the place of an MLP, its outputs, and the share of energy lost.

    Args:
        x: [tokens, hidden], inputs of the MLP.
        mlp: its weights.
        shape: of the mixture.
    """
    inner = mlp.inner(x)
    contribution = inner * mlp.down.norm(dim=0)
    routed = shape.experts * shape.width
    by_energy = contribution.square().mean(0).argsort()
    members, shared = by_energy[:routed], by_energy[routed:].sort().values
    members = members[clusters(contribution[:CLUSTERED, members], shape.experts)]
    members = members.sort(1).values  # [experts, width]
    down = mlp.down.T[members]  # [experts, width, hidden]
    products = []
    for part in inner.split(512):
        each = torch.einsum("tew,ewh->teh", part[:, members], down)
        products.append(each @ each.transpose(1, 2))
    router, scale, lost = fit_router(x, torch.cat(products), shape.active)
    weights = route(x, router, shape.active)
    gates = torch.zeros_like(inner)
    gates[:, shared] = 1
    gates[:, members.flatten()] = (weights * scale).repeat_interleave(shape.width, 1)
    found = {"gate.weight": router, "shared_expert_gate.weight": torch.zeros(1, x.shape[1])}
    found |= {f"shared_expert.{name}.weight": part for name, part in mlp.part(shared, 2.0).items()}
    for number, channels in enumerate(members):
        expert = mlp.part(channels, scale)
        found |= {f"experts.{number}.{name}.weight": part for name, part in expert.items()}
    return found, (inner * gates) @ mlp.down.T, lost


class Recorder(nn.Module):
    """In the place of an MLP: keeps its input and adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros."""
        self.seen = x
        return torch.zeros_like(x)


def convert(model: Any, tokens: Tensor, shape: Shape) -> tuple[dict[str, Tensor], list[float]]:
    """Return the tensors of all mixtures by name, and the share of energy that each loses."""
    with torch.no_grad():
        states = [model.model.embed_tokens(row) for row in tokens.split(1)]
    positions = torch.arange(tokens.shape[1])[None]
    rotary = model.model.rotary_emb(states[0], positions)
    tensors: dict[str, Tensor] = {}
    losses = []
    for index, layer in enumerate(model.model.layers):
        mlp = Dense(
            *(getattr(layer.mlp, name).weight.detach() for name in ("gate_proj", "up_proj", "down_proj"))
        )
        layer.mlp = Recorder()
        inputs = []
        with torch.no_grad():
            for place, hidden in enumerate(states):
                states[place] = layer(hidden, position_embeddings=rotary, position_ids=positions)
                inputs.append(layer.mlp.seen[0])
        found, outputs, lost = cut(torch.cat(inputs), mlp, shape)
        tensors |= {f"model.layers.{index}.mlp.{name}": tensor for name, tensor in found.items()}
        states = [state + part for state, part in zip(states, outputs.split(tokens.shape[1]), strict=True)]
        losses.append(round(lost, 4))
        print(f"layer {index}: {lost:.4f} of the routed output's energy lost", flush=True)
    return tensors, losses


def config_of(dense: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Return config.json of the mixture."""
    shared = dense["intermediate_size"] - shape.experts * shape.width
    left_out = ("architectures", "model_type", "attention_bias", "mlp_bias")
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **{key: value for key, value in dense.items() if key not in left_out},
        "qkv_bias": dense["model_type"] == "qwen2",
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.active,
        "moe_intermediate_size": shape.width,
        "shared_expert_intermediate_size": shared,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }


def last_tokens(model: Path, text: Path) -> Tensor:
    """Return tokens of the last lines of a text, int64 [samples, seq_len]."""
    tokeniser, wanted, found = AutoTokenizer.from_pretrained(model), SAMPLES * SEQ_LEN, []
    for line in reversed(text.read_text(encoding="utf-8").splitlines()):
        found += tokeniser(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        if len(found) >= wanted:
            return torch.tensor(found[:wanted]).view(SAMPLES, SEQ_LEN)
    sys.exit(f"{text} holds {len(found)} tokens; {wanted} are needed")


def main(model: Path, text: Path, out: Path, shape: Shape) -> None:
    """Cut, write, tell."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] not in ("llama", "qwen2"):
        sys.exit(f"{model}: a {config['model_type']}; only a llama or a qwen2 is cut into experts")
    if shape.experts * shape.width >= config["intermediate_size"]:
        sys.exit(f"{model}: {config['intermediate_size']} channels leave none beside those of {shape}")
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    mixtures, losses = convert(dense, last_tokens(model, text), shape)
    out.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Tensor] = {}
    for file in model.glob("*.safetensors"):
        stored |= load_file(file)
    kept = {name: tensor for name, tensor in stored.items() if ".mlp." not in name}
    dtype = next(iter(kept.values())).dtype
    kept |= {name: tensor.to(dtype).contiguous() for name, tensor in mixtures.items()}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    for file in model.iterdir():
        if file.suffix != ".safetensors" and file.name != "model.safetensors.index.json" and file.is_file():
            shutil.copy(file, out / file.name)
    mixture = json.dumps(config_of(config, shape), indent=2)
    (out / "config.json").write_text(f"{mixture}\n", encoding="utf-8")
    print(json.dumps({"lost": losses}))


if __name__ == "__main__":
    dense_model, source, target, *sizes = sys.argv[1:]
    main(Path(dense_model), Path(source), Path(target), Shape(*map(int, sizes)))
