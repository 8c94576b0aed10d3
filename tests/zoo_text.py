"""Models of transformers from their configurations: decoders with tied embeddings, encoders, encoder-decoders, state spaces."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from specimens import ADAMW, CLASSES, SGD, WORDS, Specimen, at_times_padded, labels, padded, sorted_by_kind, text, unpadded, words

DECODER, ENCODER, BOTH, RECURRENT = "decoder with tied embedding", "encoder", "encoder-decoder", "state-space or recurrent"
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 32, **SPECIAL}
GATED = {**WIDE, "intermediate_size": 32, "tie_word_embeddings": True}
BIDIRECTIONAL = {**WIDE, "intermediate_size": 32, "num_labels": CLASSES}
MODEL = {"vocab_size": WORDS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
MODEL |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32, **SPECIAL}
MODEL |= {"decoder_start_token_id": 2, "forced_eos_token_id": None}


def transformer(model: str, settings: dict[str, Any]) -> nn.Module:
    """Makes a model of transformers by its class's name, with all that draws at random off."""
    import transformers

    kind = getattr(transformers, model)
    config = kind.config_class(**settings)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return kind(config)


def specimen(family: str, model: str, batch: Any, settings: dict[str, Any], called: str = "", exact: bool = True, **more: Any) -> Specimen:
    make, options = partial(transformer, model, settings | more), {"optimizer": ADAMW if exact else SGD}
    return Specimen(f"hf {called or model}", family, make, batch, None, options, exact=exact)


decoder, encoder, both, recurrent = (partial(specimen, family) for family in (DECODER, ENCODER, BOTH, RECURRENT))


# Batches --------------------------------------------------------------------------------------------------------------


def translated(n: int, g: Generator) -> dict[str, Tensor]:
    """Padded sentences, and their translations of another length."""
    return {**padded(n, g), "labels": words(n, g, 4 + n)}


def prompted(n: int, g: Generator) -> dict[str, Tensor]:
    """Translations with what the decoder sees of them, which other models make from the labels themselves."""
    batch = translated(n, g)
    return {**batch, "decoder_input_ids": batch["labels"].roll(1, 1)}


def two_segments(n: int, g: Generator) -> dict[str, Tensor]:
    """Padded rows with a class each, made of two sentences."""
    batch = sorted_by_kind(n, g)
    return {**batch, "token_type_ids": (torch.arange(batch["input_ids"].shape[1]) > 4).long().expand_as(batch["input_ids"])}


def spans(n: int, g: Generator) -> dict[str, Tensor]:
    """Padded rows with a span in each that answers a question."""
    batch = padded(n, g)
    del batch["labels"]
    return {**batch, "start_positions": torch.randint(3, (n,), generator=g), "end_positions": torch.randint(3, (n,), generator=g)}


def pixels(n: int, g: Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, 3, 16, 16, generator=g), "labels": labels(n, g)}


def sound(n: int, g: Generator) -> dict[str, Tensor]:
    return {"input_values": torch.randn(n, 400, generator=g), "labels": labels(n, g)}


def speech(n: int, g: Generator) -> dict[str, Tensor]:
    return {"input_features": torch.randn(n, 8, 40, generator=g), "labels": words(n, g, 4 + n)}


fixed = partial(text, length=8)


# Models ---------------------------------------------------------------------------------------------------------------

GPT2 = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, **SPECIAL}
T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
T5 |= {**SPECIAL, "decoder_start_token_id": 0}
PATCHES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16, "patch_size": 4}
WAVE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
}
WAVE |= {"conv_kernel": (10, 4), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
WAVE |= {"classifier_proj_size": 16, "apply_spec_augment": False, "num_labels": CLASSES}
MAMBA = {"vocab_size": WORDS, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, **SPECIAL}

SPECIMENS = (
    decoder("GPT2LMHeadModel", text, GPT2),
    decoder("LlamaForCausalLM", text, GATED, num_key_value_heads=1),
    decoder("LlamaForCausalLM", unpadded, GATED, called="Llama under a mask of ones", exact=False, num_key_value_heads=1),
    decoder("GPT2LMHeadModel", unpadded, GPT2, called="GPT-2 under a mask of ones"),
    decoder("GPT2LMHeadModel", at_times_padded, GPT2, called="GPT-2 padded at times"),
    decoder("OPTForCausalLM", padded, GATED, ffn_dim=32, word_embed_proj_dim=16),
    decoder("MistralForCausalLM", text, GATED, num_key_value_heads=1, sliding_window=6),
    decoder("Qwen2ForCausalLM", padded, GATED, num_key_value_heads=2),
    decoder("Qwen3ForCausalLM", text, GATED, num_key_value_heads=1, head_dim=8),
    decoder("GPTNeoXForCausalLM", text, GATED, rotary_pct=0.5),
    decoder("GemmaForCausalLM", text, GATED, num_key_value_heads=1, head_dim=8),
    decoder("BloomForCausalLM", text, GATED, n_layer=3, n_head=2),
    decoder("FalconForCausalLM", text, GATED),
    decoder("PhiForCausalLM", text, GATED),
    decoder("GPTJForCausalLM", text, GPT2, rotary_dim=4, tie_word_embeddings=False),
    encoder("BertForSequenceClassification", two_segments, BIDIRECTIONAL),
    encoder("BertForMaskedLM", padded, BIDIRECTIONAL),
    encoder("RobertaForTokenClassification", padded, BIDIRECTIONAL, num_labels=WORDS, max_position_embeddings=40),
    encoder("DistilBertForQuestionAnswering", spans, SPECIAL, vocab_size=WORDS, dim=16, n_layers=3, n_heads=2, hidden_dim=32),
    encoder("AlbertForSequenceClassification", sorted_by_kind, BIDIRECTIONAL, embedding_size=8),
    encoder("ElectraForSequenceClassification", sorted_by_kind, BIDIRECTIONAL, embedding_size=8),
    encoder("DebertaV2ForMaskedLM", padded, BIDIRECTIONAL, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    encoder("ModernBertForSequenceClassification", sorted_by_kind, BIDIRECTIONAL, cls_token_id=1, sep_token_id=2),
    encoder("ViTForImageClassification", pixels, PATCHES, num_labels=CLASSES),
    encoder("Wav2Vec2ForSequenceClassification", sound, WAVE),
    both("T5ForConditionalGeneration", prompted, T5),
    both("BartForConditionalGeneration", translated, MODEL),
    both("MarianMTModel", translated, MODEL, decoder_start_token_id=0),
    both("PegasusForConditionalGeneration", translated, MODEL),
    both("WhisperForConditionalGeneration", speech, MODEL, num_mel_bins=8, max_source_positions=20, max_target_positions=16),
    recurrent("MambaForCausalLM", fixed, MAMBA),
    recurrent("Mamba2ForCausalLM", fixed, MAMBA, num_heads=4, head_dim=8, n_groups=2, chunk_size=4),
    recurrent("FalconMambaForCausalLM", fixed, MAMBA),
)
