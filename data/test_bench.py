# SPDX-License-Identifier: MIT
"""The day with a GPU runs to its end on a CPU, and the plan's memory is what layers really keep."""

import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent))
import bench

alphapo = bench.alphapo


def test_a_day_with_a_gpu_rehearsed_on_tiny_shapes():
    command = [sys.executable, bench.__file__, "--gpu-day", "--rehearse"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=480)
    lines = {line["what"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert not {what: line for what, line in lines.items() if {"error", "skipped"} & line.keys()}
    assert {f"end of {name}" for name in bench.PARTS} <= lines.keys()
    assert lines["7B on 24 GiB"]["offload"] == "layers"
    assert len(lines["7B, shared rows, kernels"]["shares"]) == 12
    assert all(line["tflops"] > 0 for what, line in lines.items() if "step" in what or "1B" in what)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "qwen3"])
def test_a_micro_batch_in_bfloat16_stays_on_its_device_while_layers_are_recomputed(kind):
    """On the meta device, where nothing can wait for a figure and no two devices can meet. One row
    and an index in place of a mask, because a mask asks the device how many tokens it keeps."""
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(kind, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    settings = alphapo.Config(offload="false", device="cpu", dtype="float32")
    settings.gradient_checkpointing = True
    model = alphapo.shard(model.eval(), None, settings, pin_memory=False)
    pair = alphapo.Pair(*(np.arange(1, n, dtype=np.int32) for n in (6, 10, 5)))
    index = torch.nonzero(alphapo.make_rows([pair])[2][0] > 0)[:, 0].to("meta")
    input_ids, position_ids, segments, targets = alphapo.make_rows([pair], device="meta")
    assert input_ids.shape[1] % 8 == 0
    masks = alphapo.attention_masks(config, position_ids, segments, torch.bfloat16)
    inputs = dict(position_ids=position_ids, attention_mask=masks, use_cache=False)
    logits = model(input_ids, **inputs, logits_to_keep=index).logits
    torch.nn.functional.cross_entropy(logits[0].float(), targets).backward()
    assert all(param.grad.device.type == "meta" for param in model.parameters())


class LiveBytes(TorchDispatchMode):
    """The most bytes that were alive at a time, of tensors that were made inside."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def forget(self, address, size):
        self.known.discard(address)
        self.now -= size


@pytest.mark.parametrize("plain_rows", [False, True])
@pytest.mark.parametrize("lengths", [(180, 350, 350), (1000, 100, 100)])  # logits, or layers
@pytest.mark.parametrize("vocabulary", [32000, 128256])
def test_memory_of_activations_is_what_was_planned(vocabulary, lengths, plain_rows, monkeypatch):
    count, shape = 6, bench.SHAPES["mistral-7b"] | dict(vocab_size=vocabulary, num_hidden_layers=8)
    shape = transformers.AutoConfig.for_model(**shape)
    pairs = [alphapo.Pair(*(np.arange(3, 3 + n, dtype=np.int32) for n in lengths))] * count
    run = alphapo.Config(device="cpu", dtype="float32", offload="false", plain_rows=plain_rows)
    run.gradient_checkpointing = True
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).eval()
        kept = torch.arange(count * sum(lengths[1:]))  # a mask would leave the size unknown
        slicing = sys.modules[type(model).__module__], "slice_logits_to_keep"
        monkeypatch.setattr(*slicing, lambda hidden, mask: hidden.flatten(0, 1)[kept])
        model, live = alphapo.shard(model, None, run, False), LiveBytes()
        for param in model.parameters():  # gradients are planned with the weights
            param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
        for tensor in [*model.parameters(), *model.buffers()]:
            live.known.add(tensor.untyped_storage()._cdata)
        with live:
            chosen, rejected = alphapo.pair_logps(model, pairs, plain_rows)
            (chosen - rejected).sum().backward()
    run.device, run.dtype, run.batch_size = "cuda", "bfloat16", 64
    run.micro_tokens = sum(alphapo.pair_tokens(pair, plain_rows) for pair in pairs)
    planned = alphapo.activation_memory(model, run, pairs)
    assert planned == pytest.approx(live.peak / bench.GIB, rel=0.1)
