"""Estimate memory and speed from a model's sizes, on GPUs that are listed with their bandwidth."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from qwenq.errors import UsageError
from qwenq.models.block_shapes import Block
from qwenq.models.shapes import ITEMSIZE, ModelShape


@dataclass(frozen=True)
class Gpu:
    """A GPU: memory in GiB, peak memory bandwidth in GB/s (10^9 bytes), and where the figures come from."""

    name: str
    title: str
    memory_gib: float
    bandwidth_gb_s: float
    source: str
    # 10^12 operations a second when a dense model was quantised; None: not measured
    quantising_tflops: float | None = None


def gpu(name: str) -> Gpu:
    """Return the GPU of a short name such as ``h200``."""
    found = _known().get(name.lower())
    if found is None:
        from rapidfuzz import process

        typed = name.lower().replace("-", "")
        near = [each for each in _known() if typed and each.replace("-", "").startswith(typed)]
        near = near or [str(match[0]) for match in process.extract(name.lower(), list(_known()), limit=1)]
        raise UsageError(
            f"GPU {name!r} is not known",
            where="--gpu",
            hint=f"did you mean {' or '.join(near[:3])}? Known: {', '.join(_known())}",
        )
    return found


def gpu_names() -> list[str]:
    """Return all short names."""
    return list(_known())


@cache
def _known() -> dict[str, Gpu]:
    text = files("qwenq.planner").joinpath("gpus.toml").read_text(encoding="utf-8")
    return {name: Gpu(name=name, **fields) for name, fields in tomllib.loads(text).items()}


# Estimate memory at load, at quantisation and at generation, in bytes.
#
# A test holds the estimate of quantising against the measured peaks of reports/benchmarks/memory.json.
#
# The cache holds the keys and values of each token once. The peaks of the published cards are weights and
# twice the cache: in 2023 the old ``past_key_values`` stayed alive while ``torch.cat`` built the new one.


GIB = 2**30
FLOAT32 = ITEMSIZE["float32"]
PROCESS = 550_000_000  # resident after the imports of `qwenq quantize`, no weights read


@dataclass(frozen=True)
class GenerationMemory:
    """Peak bytes of running a model, by part."""

    weights: int  # the checkpoint's tensors, resident
    load: int  # weights and the largest tensor in flight, of a lazy loader
    kv_cache: int  # keys and values of ``context`` tokens of ``batch`` sequences
    states: int  # of linear attention, of ``batch`` sequences of any length
    # while ``context`` tokens of one sequence are encoded (without a score matrix; logits of the last
    # position only, with a float32 copy)
    prefill_activations: int
    decode_activations: int  # while one token of each sequence is generated
    # single-copy cache, a prompt that fills the context: weights, cache, states, prefill activations
    peak: int
    # single-copy cache, generated from one token: weights, cache, states, decode activations
    decode_peak: int


@dataclass(frozen=True)
class QuantisationMemory:
    """Peak bytes of quantising block by block, by part; everything else stays on disk."""

    process: int  # Python, torch and transformers
    block: int  # the weights of one decoder block, in the compute dtype
    file: int  # the same once more in RAM: pages of the file that they are read from; 0 for a GPU's memory
    # float32, of the widest input: H, the matrix of asymmetric calibration (C, or W C if smaller); two
    # matrices of the size of H while the factor is made; and a third, which the measured peak shows and this
    # model does not explain
    hessians: int
    weights: int  # float32 weights of the linears that read one input, twice: the original and the target
    activations: int  # hidden states between the blocks, of the original and of the quantised model
    block_activations: int  # of both, inside the block: residual, normed input, input of the widest linear
    embedding: int  # read for the first block only
    peak: int  # all of these, with the larger of the embedding and what a block takes


def activation_bytes(shape: ModelShape, tokens: int, itemsize: int) -> int:
    """Return the bytes of one block's tensors for that many tokens: the larger of attention and MLP.

    Residual and normed input; and either q, k, v, the rotated q and k, and the output (of linear attention:
    what is convolved, before and after, and gate, output and normed output), or gate, up and their product,
    for every expert of a token. Fused kernels need less; eager attention needs a score matrix, too.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inside = [(4 if shape.output_gate else 3) * queries + 3 * keys, 3 * shape.ffn]
    if (linear := shape.linear_attention) is not None:
        inside.append(2 * linear.channels + 3 * linear.values)
    if (experts := shape.experts) is not None:
        inside.append(shape.hidden + 3 * (experts.active * experts.width + experts.shared_width))
    return tokens * (2 * shape.hidden + max(inside)) * itemsize


def generation_memory(
    shape: ModelShape, weights: int, *, dtype: str, context: int, batch: int = 1
) -> GenerationMemory:
    """Return the peak bytes of running ``weights`` bytes of a model, activations and cache in ``dtype``."""
    itemsize = ITEMSIZE[dtype]
    kv_cache = shape.kv_bytes_per_token(dtype) * context * batch
    states = shape.state_bytes(dtype) * batch
    logits = batch * shape.vocab * (itemsize + FLOAT32)
    prefill = activation_bytes(shape, context, itemsize) + logits
    decode = activation_bytes(shape, batch, itemsize) + logits
    return GenerationMemory(
        weights=weights,
        load=weights + shape.embedding_parameters * itemsize,
        kv_cache=kv_cache,
        states=states,
        prefill_activations=prefill,
        decode_activations=decode,
        peak=weights + kv_cache + states + max(prefill, decode),
        decode_peak=weights + kv_cache + states + decode,
    )


def quantisation_memory(
    shape: ModelShape, *, samples: int, seq_len: int, dtype: str = "bfloat16", on_gpu: bool = False
) -> QuantisationMemory:
    """Return the peak bytes of quantising block by block; 4 and 8 bits differ by the packed block only."""
    itemsize, tokens = ITEMSIZE[dtype], samples * seq_len
    hessians, weights = max(
        (
            ((4 * width + min(rows, width)) * width * FLOAT32, 2 * rows * width * FLOAT32)
            for block in shape.blocks
            for rows, width, _, _ in block.solved_groups()
        ),
        key=sum,
    )
    block = shape.block_parameters * itemsize
    file = 0 if on_gpu else block
    activations = 2 * tokens * shape.hidden * itemsize
    inside = 2 * tokens * max(_held(shape, block) for block in shape.blocks) * itemsize
    embedding = shape.embedding_parameters * itemsize
    return QuantisationMemory(
        process=PROCESS,
        block=block,
        file=file,
        hessians=hessians,
        weights=weights,
        activations=activations,
        block_activations=inside,
        embedding=embedding,
        peak=PROCESS + activations + max(embedding, block + file + hessians + weights + inside),
    )


def _held(shape: ModelShape, block: Block) -> int:
    """Return the values of a token that a block holds while one of its linears is quantised.

    The residual, its normed input or the sum over experts, and the input of the widest linear; an expert sees
    its share of the tokens.
    """
    widest = max(linear.columns * linear.active / linear.copies for linear in block.linears)
    if not block.attends and shape.linear_attention is not None:
        widest = max(widest, shape.linear_attention.channels + shape.linear_attention.values)
    mixture = shape.hidden if any(linear.copies > 1 for linear in block.linears) else 0
    return int(shape.hidden + mixture + widest)


CPU_RATES = 293e9, 85e9
"""Operations a second of products and of the solver: 2 threads of an AMD EPYC that multiplies bfloat16
(reports/benchmarks/quantize_profile.json)."""
PRODUCT_RATES = 420e9, 192e9
"""Operations a second of a large product in bfloat16 and in float32 on that CPU."""
DELTA_RULE = 0.37 / (256 * 48)
"""Seconds of a thread for one token and head of linear attention, in torch (Qwen3.5-27B's sizes)."""
CPU_THREADS = 2


def quantisation_operations(
    shape: ModelShape, tokens: int, *, asymmetric: bool = True
) -> tuple[float, float]:
    """Return the operations of all layers: of products (with text and with Hessians), and of the solver.

    Attention's own products, reading and packing are left out. With asymmetric calibration the original model
    reads the text as well, and targets are shifted.
    """
    products = solving = 0.0
    for block in shape.blocks:
        for rows, width, copies, share in block.solved_groups():
            seen = tokens * share  # by each copy
            of_text = seen * width * (2 * rows + width)
            of_weights = 2 * rows * width**2
            if asymmetric:
                drift = 2 * rows if rows < width else width
                target = 6 * rows * width if rows <= width else 4 * width**2 + 2 * rows * width
                of_text += seen * width * 2 * (rows + drift)
                of_weights += width * target
            products += len(block.layers) * copies * (of_text + of_weights)
            solving += len(block.layers) * copies * width**2 * (2 / 3 * width + 6 * rows)
    return products, solving


def quantisation_seconds(
    shape: ModelShape,
    tokens: int,
    gpu: Gpu | None = None,
    *,
    rates: tuple[float, float] = PRODUCT_RATES,
    asymmetric: bool = True,
) -> float | None:
    """Return the seconds that the layers take, without the check; None: no rate was measured.

    Without a GPU it is two cores of a CPU, as ``CPU_RATES`` says, or a CPU whose large products have these
    ``rates``, in the dtype of the text's passes and in float32.
    """
    products, solving = quantisation_operations(shape, tokens, asymmetric=asymmetric)
    if gpu is None:
        of_products, of_solver = (own / here for own, here in zip(PRODUCT_RATES, rates, strict=True))
        seconds = products / CPU_RATES[0] * of_products + solving / CPU_RATES[1] * of_solver
        if (linear := shape.linear_attention) is not None:
            layers = sum(len(block.layers) for block in shape.blocks if not block.attends)
            seconds += 2 * tokens * layers * linear.value_heads * DELTA_RULE / CPU_THREADS
        return seconds
    if gpu.quantising_tflops is None or shape.experts is not None or shape.linear_attention is not None:
        return None
    return (products + solving) / (gpu.quantising_tflops * 1e12)


# Bound the speed of generation by bandwidth: a token cannot come faster than its bytes can be read.
#
# Each step reads every weight once (of an untied embedding only a row a sequence, of experts only those that
# some sequence is routed to), the recurrent states, and the keys and values of every earlier token of every
# sequence. Launch overhead, attention arithmetic and sampling come on top.


@dataclass(frozen=True)
class SpeedBound:
    """Upper bounds in tokens per second, over all sequences of the batch."""

    gpu: str
    gpus: int
    bytes_per_step: int  # weight bytes read at each step; of a mixture, those of the active experts
    empty: float  # with nothing in the cache
    full: float  # with ``context`` tokens of each sequence in the cache
    mean: float  # generating from the first token to the last of ``context``


def weight_bytes_per_step(shape: ModelShape, weights: int, dtype: str, idle: int = 0) -> int:
    """Return the weight bytes that one decoding step reads, of all ``weights``.

    An untied embedding, of ``dtype``, is only looked up; ``idle`` are bytes of experts that no sequence is
    routed to (``ModelShape.idle_bytes``).
    """
    return weights - idle - (0 if shape.tied else shape.embedding_parameters * ITEMSIZE[dtype])


def speed_bound(
    shape: ModelShape,
    weights: int,
    gpu: Gpu,
    *,
    dtype: str,
    context: int,
    batch: int = 1,
    gpus: int = 1,
    idle: int = 0,
) -> SpeedBound:
    """Return the bound for ``gpus`` GPUs that share weights and cache evenly, with communication for free."""
    read = weight_bytes_per_step(shape, weights, dtype, idle)
    states = 2 * shape.state_bytes(dtype) * batch  # read and written
    bandwidth = gpu.bandwidth_gb_s * 1e9 * gpus
    kv = shape.kv_bytes_per_token(dtype) * batch
    return SpeedBound(
        gpu=gpu.name,
        gpus=gpus,
        bytes_per_step=read,
        empty=batch * bandwidth / (read + states),
        full=batch * bandwidth / (read + states + kv * context),
        # total time is the sum over n = 0 … context - 1 of (read + states + kv * n) / bandwidth
        mean=batch * bandwidth / (read + states + kv * (context - 1) / 2),
    )
