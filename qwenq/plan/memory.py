"""Estimate memory at load, at quantisation and at generation, in bytes.

A test holds the estimate of quantising against the measured peaks of reports/benchmarks/memory.json.

The cache holds the keys and values of each token once. The peaks of the published cards are weights and twice
the cache: in 2023 the old ``past_key_values`` stayed alive while ``torch.cat`` built the new one.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwenq.models.shapes import ITEMSIZE, ModelShape

GIB = 2**30
FLOAT32 = ITEMSIZE["float32"]
PROCESS = 550_000_000  # resident after the imports of `qwenq quantize`, no weights read


@dataclass(frozen=True)
class GenerationMemory:
    """Peak bytes of running a model, by part.

    Attributes:
        weights: the checkpoint's tensors, resident.
        load: weights and the largest tensor in flight, of a lazy loader.
        kv_cache: keys and values of ``context`` tokens of ``batch`` sequences.
        prefill_activations: while ``context`` tokens of one sequence are encoded (without a score matrix;
            logits of the last position only, with a float32 copy).
        decode_activations: while one token of each sequence is generated.
        peak: single-copy cache, a prompt that fills the context: weights, cache, prefill activations.
        decode_peak: single-copy cache, generated from one token: weights, cache, decode activations.
    """

    weights: int
    load: int
    kv_cache: int
    prefill_activations: int
    decode_activations: int
    peak: int
    decode_peak: int


@dataclass(frozen=True)
class QuantisationMemory:
    """Peak bytes of quantising block by block, by part; everything else stays on disk.

    Attributes:
        process: Python, torch and transformers.
        block: the weights of one decoder block, in the compute dtype.
        hessians: float32, of the widest input: H, the matrix of asymmetric calibration (C, or W C if
            smaller); two matrices of the size of H while the factor is made; and a third, which the measured
            peak shows and this model does not explain.
        weights: float32 weights of the linears that read one input, twice: the original and the target.
        activations: hidden states between the blocks, of the original and of the quantised model.
        block_activations: of both, inside the block: residual, normed input, input of the widest linear.
        embedding: read for the first block only.
        peak: all of these, with the larger of the embedding and what a block takes.
    """

    process: int
    block: int
    hessians: int
    weights: int
    activations: int
    block_activations: int
    embedding: int
    peak: int


def activation_bytes(shape: ModelShape, tokens: int, itemsize: int) -> int:
    """Return the bytes of one block's tensors for that many tokens: the larger of attention and MLP.

    Residual and normed input; and either q, k, v, the rotated q and k, and the output, or gate, up and their
    product. Fused kernels need less; eager attention needs a score matrix, too.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 3 * queries + 3 * keys  # q, rotated q, output; k, rotated k, v
    return tokens * (2 * shape.hidden + max(attention, 3 * shape.ffn)) * itemsize


def generation_memory(
    shape: ModelShape, weights: int, *, dtype: str, context: int, batch: int = 1
) -> GenerationMemory:
    """Return the peak bytes of running ``weights`` bytes of a model, activations and cache in ``dtype``."""
    itemsize = ITEMSIZE[dtype]
    kv_cache = shape.kv_bytes_per_token(dtype) * context * batch
    logits = batch * shape.vocab * (itemsize + FLOAT32)
    prefill = activation_bytes(shape, context, itemsize) + logits
    decode = activation_bytes(shape, batch, itemsize) + logits
    return GenerationMemory(
        weights=weights,
        load=weights + shape.embedding_parameters * itemsize,
        kv_cache=kv_cache,
        prefill_activations=prefill,
        decode_activations=decode,
        peak=weights + kv_cache + max(prefill, decode),
        decode_peak=weights + kv_cache + decode,
    )


def quantisation_memory(
    shape: ModelShape, *, samples: int, seq_len: int, dtype: str = "bfloat16"
) -> QuantisationMemory:
    """Return the peak bytes of quantising block by block; 4 and 8 bits differ by the packed block only."""
    itemsize, tokens = ITEMSIZE[dtype], samples * seq_len
    queries = shape.heads * shape.head_dim
    groups = (  # rows of the linears that share an input, and its width
        (queries + 2 * shape.kv_heads * shape.head_dim, shape.hidden),
        (shape.hidden, queries),
        (2 * shape.ffn, shape.hidden),
        (shape.hidden, shape.ffn),
    )
    hessians, weights = max(
        (
            ((4 * width + min(rows, width)) * width * FLOAT32, 2 * rows * width * FLOAT32)
            for rows, width in groups
        ),
        key=sum,
    )
    block = shape.block_parameters * itemsize
    activations = 2 * tokens * shape.hidden * itemsize
    inside = 2 * tokens * (shape.hidden + max(queries, shape.ffn)) * itemsize
    embedding = shape.embedding_parameters * itemsize
    return QuantisationMemory(
        process=PROCESS,
        block=block,
        hessians=hessians,
        weights=weights,
        activations=activations,
        block_activations=inside,
        embedding=embedding,
        peak=PROCESS + activations + max(embedding, block + hessians + weights + inside),
    )
