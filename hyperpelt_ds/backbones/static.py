"""Static weights in a stock transformers model: the loader that every export carries as `static.py`.

It needs torch and transformers only, and must import nothing of the package that it was copied from:

    model = AutoModelForSeq2SeqLM.from_pretrained(...)  # the backbone that config.json names
    detach = attach(model, folder)  # forward and generate now answer as the trained run does for this task
    detach()  # and now as before

Every tensor of weights.safetensors is named by the module that it belongs to: prefix_keys and prefix_values (P, K) by
an attention, adapter_0_down (D, R), ... by the module whose output it adds to, lora_down (I, r) and lora_up (r, O) by a
linear map, weight and bias by a layer norm that was trained, image_tokens (V, D) by the encoder. Apache License 2.0.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.utils.versions import require_version

NAME = "hyperpelt_static"
VERSION = 1
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def attach(model: Any, folder: str | Path) -> Callable[[], None]:
    """Puts the weights in `folder` into `model` and returns the function that takes all of it out again.

    They move and change type with the model; of them all, only norms would be saved with it. Raises ValueError for a
    model that they were not made for, and for one that has such weights already.
    """
    require_version("transformers>=5.17", "older ones do not call attention by name in every model")
    config = json.loads((Path(folder) / "config.json").read_text())
    _check(model, config)
    undo: list[Callable[[], None]] = []
    for name, tensor in load_file(Path(folder) / "weights.safetensors").items():
        path, _, field = name.rpartition(".")
        module = model.get_submodule(path)
        undo.append(_put(module, field, tensor.to(next(module.parameters()).device, model.dtype)))
    for module in list(model.modules()):
        if hasattr(module, "lora_down"):
            undo.append(module.register_forward_hook(_low_rank).remove)
    act = ACTIVATIONS[config["adapter"]["activation"]]
    for written, read in config["adapter"]["places"].items():  # after the deltas: they read what these changed
        undo += _adapter(model.get_submodule(written), model.get_submodule(read) if read else None, act)
    if model.config.is_encoder_decoder and hasattr(model.get_encoder(), "image_tokens"):
        undo += _image(model, model.get_encoder())
    undo.append(functools.partial(setattr, model, "generation_config", model.generation_config))
    undo.append(functools.partial(_call_attention, model, model.config._attn_implementation))
    model.generation_config = GenerationConfig.from_pretrained(folder)
    _call_attention(model, NAME)

    def detach() -> None:
        while undo:
            undo.pop()()

    return detach


def _check(model: Any, config: dict[str, Any]) -> None:
    if config["version"] != VERSION:
        raise ValueError(
            f"config.json has version {config['version']} of the format, this loader reads {VERSION}; export once more"
        )
    if model.config._attn_implementation == NAME:
        raise ValueError("this model has static weights already: call what attach returned for them first")
    backbone, kind = config["backbone"], model.config.model_type
    if kind != backbone["model_type"]:
        raise ValueError(f"the weights were made for {backbone['model_type']} ({backbone['id']}), this model is {kind}")
    # within two per cent, because either may have been rounded to bfloat16
    if not torch.allclose(sample(model), torch.tensor(backbone["sample"]), rtol=0.02, atol=1e-6):
        raise ValueError(
            f"the weights were made for {backbone['id']}, this {kind} model has other embeddings; load that one"
        )


def sample(model: Any) -> Tensor:
    """Sixteen numbers of the word embeddings, float32, by which one model is told from another of its type."""
    weight = model.get_input_embeddings().weight.detach().flatten()
    return weight[:: max(1, len(weight) // 16)][:16].float().cpu()


def _call_attention(model: Any, name: str) -> None:
    """Stack by stack: transformers before 5.20 passes by T5's, whose configurations are copies of the model's."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation(name)


def _put(module: nn.Module, field: str, tensor: Tensor) -> Callable[[], None]:
    """Holds `tensor` in the module: in place of its parameter of that name, or else as a buffer that is not saved."""
    if field not in module._parameters:
        module.register_buffer(field, tensor, persistent=False)
        return functools.partial(delattr, module, field)
    before = module.get_parameter(field)
    setattr(module, field, nn.Parameter(tensor, requires_grad=False))
    return functools.partial(setattr, module, field, before)


def _low_rank(linear: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + args[0] @ linear.lora_down @ linear.lora_up


def _adapter(written: nn.Module, read: nn.Module | None, act: Callable[[Tensor], Tensor]) -> list[Callable[[], None]]:
    """Adds adapters to what `written` gives, of the input of `read`, or of what `written` gives if there is none."""
    inputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[:] = [args[0]]

    def after(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, total, number = inputs.pop() if read is not None else output, output, 0
        while hasattr(module, f"adapter_{number}_down"):
            names = ("down", "down_bias", "up", "up_bias", "gain", "shift")
            parts: list[Any] = [getattr(module, f"adapter_{number}_{name}", None) for name in names]
            down, down_bias, up, up_bias, gain, shift = parts
            added = act(x @ down + down_bias) @ up + up_bias
            if gain is not None:
                added = F.layer_norm(added, added.shape[-1:], gain, shift, 1e-5)
            total, number = total + added, number + 1
        return total

    hooks = [written.register_forward_hook(after)]
    if read is not None:
        hooks.append(read.register_forward_pre_hook(before))
    return [hook.remove for hook in hooks]


def _image(model: Any, encoder: Any) -> list[Callable[[], None]]:
    """Shows the encoder an image after every text, and lets the decoder look at it."""
    cells = encoder.image_tokens.shape[0]

    def widen(mask: Tensor | None, words: int) -> Tensor | None:
        return F.pad(mask, (0, cells), value=1) if mask is not None and mask.shape[1] == words else mask

    def of_model(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        kwargs = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        states = kwargs.get("encoder_outputs")
        words = [kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None]
        length = words[0].shape[1] if states is None else states[0].shape[1] - cells
        return (), {**kwargs, "attention_mask": widen(kwargs.get("attention_mask"), length)}

    def of_encoder(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        words = kwargs.get("inputs_embeds")
        if words is None:
            words = module.embed_tokens(kwargs["input_ids"]) * getattr(module, "embed_scale", 1.0)
        mask = widen(kwargs.get("attention_mask"), words.shape[1])
        words = torch.cat([words, module.image_tokens.expand(len(words), -1, -1)], 1)
        return args, {**kwargs, "input_ids": None, "inputs_embeds": words, "attention_mask": mask}

    def of_positions(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """An image has no place in a text: nothing is added to its tokens ((B,) T, D), ..."""
        return torch.cat([output[..., :-cells, :], torch.zeros_like(output[..., -cells:, :])], -2)

    def of_distances(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """... nor to the scores of pairs with one (T, T, H)."""
        return F.pad(output[:-cells, :-cells], (0, 0, 0, cells, 0, cells))

    hooks = [
        model.register_forward_pre_hook(of_model, with_kwargs=True),
        encoder.register_forward_pre_hook(of_encoder, with_kwargs=True),
    ]
    for name, module in encoder.named_modules():
        if name.endswith("embed_positions"):
            hooks.append(module.register_forward_hook(of_positions))
        if name.endswith("relative_attention_bias"):
            hooks.append(module.register_forward_hook(of_distances))
    return [hook.remove for hook in hooks]


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention with the module's prefix before keys (B, H, T, d) and values; masks and biases are of the rest only."""
    mask, bias, keys = attention_mask, position_bias, getattr(module, "prefix_keys", None)
    if keys is not None:
        batch, heads, length, size = key.shape
        own = [part.view(1, -1, heads, size).transpose(1, 2).expand(batch, -1, -1, -1)
               for part in (keys, module.prefix_values)]  # fmt: skip
        key, value = torch.cat([own[0], key], 2), torch.cat([own[1], value], 2)
        offset = getattr(module, "prefix_offset", None)
        if bias is None and offset is not None:
            bias = query.new_zeros((1, 1, 1, length))
        if bias is not None:
            added = bias.new_zeros(len(keys)) if offset is None else offset.to(bias.dtype)
            bias = torch.cat([added.expand(*bias.shape[:-1], -1), bias], -1)
        mask = F.pad(mask, (len(keys), 0), value=True) if mask is not None else None
    if bias is not None:
        bias = bias.to(query.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    group = query.shape[1] // key.shape[1]
    if group > 1:  # before 2.14 torch has no kernel for both that does not hold all scores
        key, value = (part.repeat_interleave(group, 1) for part in (key, value))
    output = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """True where a query may look. Always built: with a prefix, causality cannot be left to a flag."""
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
