"""transformers, optimum and GPTQModel load a folder that qwenq wrote, and compute what it means."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import Quantised
from oracle import dequantised_state

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]

PROMPTS = (
    "The capital of France is Paris, and the river that runs through it is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Water boils at a lower temperature on a mountain because",
)
# GPTQModel's plain kernel: no packing for one CPU or another.
PLAIN_KERNEL = "gptq_torch"


def load(quantised: Quantised, backend: str, dtype: torch.dtype) -> Any:
    """As a user would, but for the kernel and the dtype."""
    from transformers import AutoModelForCausalLM, GPTQConfig

    config = GPTQConfig(bits=quantised.bits, backend=backend)
    model = AutoModelForCausalLM.from_pretrained(quantised.folder, quantization_config=config, dtype=dtype)
    return model.eval()


def kernels(model: Any) -> Counter[str]:
    """Class names of the modules that hold packed weights."""
    return Counter(type(module).__name__ for module in model.modules() if hasattr(module, "qweight"))


@pytest.fixture(scope="module")
def tokenizer(quantised: Quantised) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(quantised.folder)


@pytest.fixture(scope="module")
def plain_client(quantised: Quantised) -> Any:
    """The client in float32 throughout.

    As loaded, its kernel multiplies scale by integer in float16, the dtype of the stored scales, whatever the
    dtype of the model: every weight is rounded once more. With the same scales in float32 it does not.
    """
    model = load(quantised, PLAIN_KERNEL, torch.float32)
    for module in model.modules():
        if hasattr(module, "qweight"):
            module.scales = module.scales.float()
    return model


def logits(model: Any, tokenizer: Any, prompt: str) -> torch.Tensor:
    """float32 ``[tokens, vocabulary]``."""
    with torch.inference_mode():
        return model(**tokenizer(prompt, return_tensors="pt")).logits[0].float()


def greedy(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    """The 32 tokens that follow, the likeliest each time."""
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**inputs, do_sample=False, min_new_tokens=32, max_new_tokens=32)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def difference(name: str, model: Any, quantised: Quantised, tokenizer: Any) -> tuple[float, float]:
    """Largest and mean absolute difference of the logits over all prompts; printed."""
    gaps = [logits(model, tokenizer, text) - logits(quantised.reference, tokenizer, text) for text in PROMPTS]
    gap = torch.cat(gaps).abs()  # [tokens, vocabulary]
    largest, mean = gap.max().item(), gap.mean().item()
    kernel = f"Int{quantised.bits} {name} {dict(kernels(model))}"
    print(f"\n{kernel}: logits differ by {largest:.2e} max, {mean:.2e} mean")
    return largest, mean


def test_every_linear_of_the_blocks_is_loaded_packed(plain_client: Any, quantised: Quantised) -> None:
    packed = {name for name, module in plain_client.named_modules() if hasattr(module, "qweight")}
    plain = {name for name, module in quantised.reference.named_modules() if type(module) is torch.nn.Linear}
    assert packed == plain - {"lm_head"}


def test_plain_kernel_in_float32_gives_the_logits_of_the_dequantised_model(
    plain_client: Any, quantised: Quantised, tokenizer: Any
) -> None:
    largest, mean = difference("float32 throughout", plain_client, quantised, tokenizer)
    assert largest < 2e-3
    assert mean < 1e-4


def test_plain_kernel_as_loaded_differs_by_no_more_than_its_float16_products(
    quantised: Quantised, tokenizer: Any
) -> None:
    model = load(quantised, PLAIN_KERNEL, torch.float32)
    largest, mean = difference("as loaded", model, quantised, tokenizer)
    assert largest < 0.3
    assert mean < 0.03


def test_greedy_text_is_that_of_the_dequantised_model(
    plain_client: Any, quantised: Quantised, tokenizer: Any
) -> None:
    ours = greedy(quantised.reference, tokenizer, PROMPTS[0])
    assert len(ours) == 32
    assert greedy(plain_client, tokenizer, PROMPTS[0]) == ours


@pytest.mark.parametrize("prompt", PROMPTS[1:], ids=["code", "science"])
def test_each_greedy_token_is_the_likeliest_to_the_client_too(
    plain_client: Any, quantised: Quantised, tokenizer: Any, prompt: str
) -> None:
    """Greedy text again, in one forward pass: this kernel unpacks every weight anew for every token."""
    start = tokenizer(prompt)["input_ids"]
    ours = greedy(quantised.reference, tokenizer, prompt)
    with torch.inference_mode():
        scores = plain_client(torch.tensor([start + ours])).logits[0]  # [tokens, vocabulary]
        # `greedy` asks for 32 tokens: generate() rules out the end of the text, even where it is likeliest.
        scores[:, quantised.reference.generation_config.eos_token_id] = -torch.inf
    assert scores.argmax(-1)[len(start) - 1 : -1].tolist() == ours


def test_the_kernel_that_the_client_chooses_agrees_too(quantised: Quantised, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(quantised.folder).eval()
    _, mean = difference("transformers, its own choice", model, quantised, tokenizer)
    assert mean < 0.1  # in the dtype of the config, half precision
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        agree = model(ids).logits[0].argmax(-1) == quantised.reference(ids).logits[0].argmax(-1)
    assert agree.float().mean() > 0.9


def test_qwenq_reads_the_same_weights(quantised: Quantised) -> None:
    from qwenq.models.checkpoint import open_checkpoint
    from qwenq.models.gptq_config import QuantConfig
    from qwenq.models.gptq_format import DequantisedSource

    checkpoint = open_checkpoint(quantised.folder)
    source = DequantisedSource(checkpoint.source, QuantConfig.read(checkpoint.config), torch.float32)
    expected = dequantised_state(quantised.folder)
    assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(source.read(name).float(), tensor), name


def test_tokenizer_and_chat_template_came_along(tokenizer: Any) -> None:
    text = "Hello, wörld! 你好"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    assert f"<|im_start|>user\n{text}<|im_end|>" in chat
    assert chat.endswith("<|im_start|>assistant\n")
