"""What a checkpoint says of itself: sizes, RoPE, norm epsilon. One frozen record for all formats.

Every reader is strict. A key that would change the arithmetic and is not supported is refused by
name; a size that is missing is named. Nothing is guessed from a folder's name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from reprlib import repr as short
from typing import Any

import numpy as np

from llama3np.errors import CheckpointError, InputError

PAIRINGS = ("interleaved", "half")
LLAMA3_OLD_CONTEXT = 8192  # of Llama 3, before 3.1 stretched it


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the long RoPE wavelengths (kind "llama3")."""

    factor: float  # long wavelengths are stretched by it: 8 in 3.1 and 3.3, 32 in 3.2
    low_freq_factor: float  # wavelengths above old_context / low are stretched in full
    high_freq_factor: float  # wavelengths below old_context / high are left alone
    old_context: int  # the context length before stretching, 8192

    def __post_init__(self):
        if not (math.inf > self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise InputError(
                f"RoPE scaling: expected factor >= 1 and 0 < low_freq_factor < high_freq_factor, "
                f"found factor {self.factor}, low {self.low_freq_factor}, "
                f"high {self.high_freq_factor}"
            )
        if self.old_context < 1:
            raise InputError(f"RoPE scaling: the old context is {self.old_context}")

    def divisors_P(self, theta: float, head_dim: int) -> np.ndarray:
        """What each pair's frequency is divided by, float64: 1 for short waves, factor for long.

        GGUF files carry these in place of the four numbers (tensor rope_freqs.weight).
        """
        freq_P = 1 / np.power(theta, np.arange(0, head_dim, 2) / head_dim)
        turns_P = self.old_context * freq_P / (2 * np.pi)
        span = self.high_freq_factor - self.low_freq_factor
        smooth_P = np.clip((turns_P - self.low_freq_factor) / span, 0, 1)
        return 1 / ((1 - smooth_P) / self.factor + smooth_P)


@dataclass(frozen=True)
class Config:
    """The architecture of one checkpoint; letters are those of the dimension key."""

    dim: int  # D, model width
    n_layers: int  # L
    n_heads: int  # N = K * G, query heads
    n_kv_heads: int  # K, key/value heads
    head_dim: int  # H
    ffn_dim: int  # F, feed-forward width
    vocab_size: int  # V
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_pairing: str = "interleaved"  # or "half": how the rows of wq and wk are ordered
    tied: bool = False  # the head is the embedding table
    context_length: int = 2048  # positions the model was trained for

    def __post_init__(self):
        for name in (
            *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim"),
            *("vocab_size", "context_length"),
        ):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise InputError(f"config: expected {name} >= 1, found {short(value)}")
        if self.n_heads % self.n_kv_heads:
            raise InputError(
                f"config: expected n_heads to be a multiple of n_kv_heads, "
                f"found {self.n_heads} and {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"config: RoPE turns pairs, but head_dim is {self.head_dim}")
        if self.rope_pairing not in PAIRINGS:
            raise InputError(
                f"config: expected rope_pairing in {PAIRINGS}, found {self.rope_pairing!r}"
            )
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise InputError(f"config: expected a RopeScaling, found {short(self.rope_scaling)}")
        if not (0 <= self.norm_eps < math.inf and 0 < self.rope_theta < math.inf):
            raise InputError(
                f"config: expected norm_eps >= 0 and rope_theta > 0, "
                f"found {self.norm_eps} and {self.rope_theta}"
            )

    @property
    def group(self) -> int:
        """G, the query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads


# ---- strict look-ups: every reader below goes through them ----------------------------------


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Raise every InputError from inside as a CheckpointError that begins with the file's name."""
    try:
        yield
    except InputError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _present(values: Mapping[str, Any], key: str, default: Any) -> Any:
    value = values.get(key, default)
    if value is None:
        raise InputError(f"expected the key {key!r}, found no such key")
    return value


def _size(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _present(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{key}: expected a whole number >= 1, found {short(value)}")
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = _present(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise InputError(f"{key}: expected a finite number, found {short(value)}")
    return float(value)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int too long for a float
        return False


def _only(values: Mapping[str, Any], neutral: Mapping[str, Any]) -> None:
    """Refuse each key of `neutral` whose value is another one: it would change the arithmetic."""
    for key, wanted in neutral.items():
        found = values.get(key, wanted)
        if found != wanted:
            raise InputError(f"{key}: only {wanted!r} is supported, found {short(found)}")


def _known(values: Mapping[str, Any], known: Collection[str], what: str) -> None:
    """Refuse what is not known: a key of a later release could change the arithmetic."""
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise InputError(f"{what} {unknown[0]!r} is not known to leave the arithmetic alone")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _head_dim(dim: int, n_heads: int) -> int:
    if dim % n_heads:
        raise InputError(f"expected a head size or a width divisible by {n_heads}, found {dim}")
    return dim // n_heads


# ---- Hugging Face config.json ----------------------------------------------------------------

_HF_READ = _words(
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim vocab_size max_position_embeddings rms_norm_eps rope_theta rope_scaling "
    "rope_parameters tie_word_embeddings"
)

# Accepted with this one value: any other changes the arithmetic or the tensors.
_HF_NEUTRAL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "use_sliding_window": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}

# Of PretrainedConfig, LlamaConfig and the tools around them; none enters the forward pass.
# pretraining_tp splits products into sums of the same terms.
_HF_HARMLESS = _words(
    "architectures torch_dtype dtype use_cache transformers_version initializer_range "
    "attention_dropout hidden_dropout bos_token_id eos_token_id pad_token_id sep_token_id "
    "decoder_start_token_id pretraining_tp _name_or_path name_or_path is_llama_config "
    "transformers.js_config unsloth_version unsloth_fixed max_sequence_length "
    "_attn_implementation _attn_implementation_autoset attn_implementation "
    "_attn_implementation_internal return_dict output_hidden_states output_attentions "
    "torchscript use_bfloat16 tf_legacy_loss pruned_heads tie_encoder_decoder "
    "cross_attention_hidden_size chunk_size_feed_forward keys_to_ignore_at_inference "
    "id2label label2id tokenizer_class prefix problem_type task_specific_params "
    "finetuning_task max_length min_length do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
    "output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens"
)

_LLAMA3_KEYS = _words("factor low_freq_factor high_freq_factor original_max_position_embeddings")


def from_hf(values: Mapping[str, Any], source: str) -> Config:
    """The Config of a Hugging Face `config.json`, given as its parsed object.

    Reads the older form (rope_theta beside rope_scaling, `type` or `rope_type`) and the newer
    (rope_parameters with rope_theta inside). JSON's null means absent, as it does there. Raises
    CheckpointError, naming `source` and the key, for a size that is missing or senseless, for a
    setting that is not supported, and for a key that is not known to be harmless.
    """
    with _naming(source):
        given = {key: value for key, value in values.items() if value is not None}
        _present(given, "model_type", None)
        _only(given, _HF_NEUTRAL)
        _known(given, (*_HF_READ, *_HF_NEUTRAL, *_HF_HARMLESS), "the key")
        dim, n_heads = _size(given, "hidden_size"), _size(given, "num_attention_heads")
        rope = _hf_rope(given)
        return Config(
            dim=dim,
            n_layers=_size(given, "num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=_size(given, "num_key_value_heads", n_heads),
            head_dim=_size(given, "head_dim") if "head_dim" in given else _head_dim(dim, n_heads),
            ffn_dim=_size(given, "intermediate_size"),
            vocab_size=_size(given, "vocab_size"),
            norm_eps=_number(given, "rms_norm_eps"),
            rope_theta=_number(rope, "rope_theta", 10000.0),  # absent in Llama 2's first configs
            rope_scaling=_hf_scaling(rope),
            rope_pairing="half",
            tied=_flag(given, "tie_word_embeddings"),
            context_length=_size(given, "max_position_embeddings"),
        )


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise InputError(f"{key}: expected true or false, found {short(value)}")
    return value


def _hf_rope(given: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings of the RoPE settings as one dict: rope_theta, rope_type and its factors."""
    merged: dict[str, Any] = {}
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        part = {key: given[key]} if key in given and key == "rope_theta" else given.get(key, {})
        if not isinstance(part, dict):
            raise InputError(f"{key}: expected an object, found {short(part)}")
        for name, value in part.items():
            name = "rope_type" if name == "type" else name
            if merged.setdefault(name, value) != value:
                raise InputError(f"{key}: {name} is {short(value)}, but also {merged[name]!r}")
    return merged


def _hf_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", "default" if set(rope) <= {"rope_theta"} else None)
    if kind not in ("default", "none", "llama3"):
        raise InputError(f"RoPE: expected rope_type 'default' or 'llama3', found {short(kind)}")
    _only(rope, {"partial_rotary_factor": 1.0})
    factors = _LLAMA3_KEYS if kind == "llama3" else ()
    _known(rope, ("rope_theta", "rope_type", "partial_rotary_factor", *factors), "the RoPE key")
    if not factors:
        return None
    factor, low, high, old_context = factors
    return RopeScaling(
        _number(rope, factor), _number(rope, low), _number(rope, high), _size(rope, old_context)
    )


# ---- Meta params.json ------------------------------------------------------------------------

_META_READ = _words(
    "dim n_layers n_heads n_kv_heads vocab_size norm_eps rope_theta multiple_of "
    "ffn_dim_multiplier use_scaled_rope max_seq_len"
)
_META_NEUTRAL: dict[str, Any] = {
    "quantization_args": None,
    "lora_args": None,
    "vision_model": None,
    "vision_chunk_size": -1,
    "vision_num_cross_attention_layers": -1,
}
_META_HARMLESS = _words("max_batch_size model_parallel_size vision_max_num_chunks")

LLAMA2_VOCAB, LLAMA3_VOCAB = 32_000, 128_000  # at least so many rows has their embedding table


def from_meta(
    values: Mapping[str, Any],
    vocab_size: int,
    ffn_dim: int,
    tied: bool,
    source: str,
    rope_factor: float | None = None,
) -> Config:
    """The Config of Meta's `params.json`, given as its parsed object.

    Rows of the embedding table and of w1, and the tie, are facts of the tensors; rope_factor is
    what the file does not tell of `use_scaled_rope`. Raises CheckpointError, as from_hf does.
    """
    with _naming(source):
        given = _meta_settings(values, vocab_size, ffn_dim)
        dim, n_heads = _size(given, "dim"), _size(given, "n_heads")
        return Config(
            dim=dim,
            n_layers=_size(given, "n_layers"),
            n_heads=n_heads,
            n_kv_heads=_size(given, "n_kv_heads", n_heads),
            head_dim=_head_dim(dim, n_heads),
            ffn_dim=ffn_dim,
            vocab_size=vocab_size,
            norm_eps=_number(given, "norm_eps", 1e-5),
            rope_theta=_number(given, "rope_theta", _meta_theta(vocab_size)),
            rope_scaling=_meta_scaling(given, rope_factor),
            tied=tied,
            context_length=_meta_context(given, vocab_size),
        )


def _meta_settings(values: Mapping[str, Any], vocab_size: int, ffn_dim: int) -> dict[str, Any]:
    """The keys that have a value, none of them unknown, unsupported or against the tensors."""
    given = {key: value for key, value in values.items() if value is not None}
    _only(given, _META_NEUTRAL)
    _known(given, (*_META_READ, *_META_NEUTRAL, *_META_HARMLESS), "the key")
    if given.get("vocab_size", -1) != -1:  # -1 stands for the tokenizer's
        _only(given, {"vocab_size": vocab_size})
    if "multiple_of" in given:
        _check_meta_ffn(given, ffn_dim)
    return given


def _check_meta_ffn(given: Mapping[str, Any], ffn_dim: int) -> None:
    multiplier = _number(given, "ffn_dim_multiplier", 1.0)
    dim, multiple_of = _size(given, "dim"), _size(given, "multiple_of")
    try:
        expected = meta_ffn_dim(dim, multiplier, multiple_of)
    except OverflowError:
        raise InputError(f"dim times {multiplier} is no width") from None
    if expected != ffn_dim:
        raise InputError(
            f"multiple_of and ffn_dim_multiplier give a feed-forward width of {expected}, "
            f"but w1 has {ffn_dim} rows"
        )


def _meta_theta(vocab_size: int) -> float:
    """What Meta's readers have where the file has no theta: llama/model.py of Llama 2, and of 3."""
    return 500000.0 if vocab_size >= LLAMA3_VOCAB else 10000.0


def meta_ffn_dim(dim: int, multiplier: float, multiple_of: int) -> int:
    """Two thirds of four widths, times the multiplier, rounded up: llama-models model.py."""
    width = int(multiplier * int(2 * (4 * dim) / 3))
    return -(-width // multiple_of) * multiple_of


def meta_rope_factor(dim: int) -> float:
    """The factor that `use_scaled_rope` stands for.

    It is 8 in Meta's code, which was written for 3.1; Hugging Face's configs of 3.2 1B and 3B,
    made by Meta, say 32. Only their widths tell those two from the others.
    """
    return 32.0 if dim in (2048, 3072) else 8.0


def _meta_scaling(given: Mapping[str, Any], rope_factor: float | None) -> RopeScaling | None:
    if not _flag(given, "use_scaled_rope"):
        if rope_factor is not None:
            raise InputError("a rope_factor was given, but the file does not have use_scaled_rope")
        return None
    factor = meta_rope_factor(_size(given, "dim")) if rope_factor is None else rope_factor
    return RopeScaling(float(factor), 1.0, 4.0, LLAMA3_OLD_CONTEXT)


def _meta_context(given: Mapping[str, Any], vocab_size: int) -> int:
    """The length that the model was trained for; the file does not tell, its family does."""
    if given.get("use_scaled_rope"):
        length = 131072
    elif vocab_size >= LLAMA3_VOCAB:
        length = LLAMA3_OLD_CONTEXT
    else:
        length = 4096 if vocab_size >= LLAMA2_VOCAB else 2048
    return _size(given, "max_seq_len", length)


# ---- GGUF metadata ---------------------------------------------------------------------------

# Accepted with this one value; the rest of what is read stands in from_gguf.
_GGUF_NEUTRAL: dict[str, Any] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scale_linear": 1.0,
    "attention.sliding_window": 0,
    "attention.causal": True,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
}

_GGUF_READ = _words(
    "embedding_length feed_forward_length block_count attention.head_count "
    "attention.head_count_kv attention.key_length attention.value_length vocab_size "
    "attention.layer_norm_rms_epsilon rope.freq_base rope.dimension_count context_length "
    "rope.scaling.original_context_length"
)

_GGUF_HARMLESS = ("tensor_data_layout", "rope.scaling.finetuned", "use_parallel_residual")


def from_gguf(
    metadata: Mapping[str, Any],
    vocab_size: int,
    tied: bool,
    source: str,
    divisors_P: np.ndarray | None = None,
) -> Config:
    """The Config of a GGUF file of architecture "llama".

    Rows of the embedding table and the tie are facts of the tensors, so they are given;
    divisors_P is the tensor rope_freqs.weight, if there is one (see scaling_from_divisors).
    Raises CheckpointError, naming `source` and the key, as from_hf does.
    """
    with _naming(source):
        given = _gguf_settings(metadata, vocab_size)
        return Config(
            dim=_size(given, "embedding_length"),
            n_layers=_size(given, "block_count"),
            n_heads=_size(given, "attention.head_count"),
            n_kv_heads=_size(given, "attention.head_count_kv", given["attention.head_count"]),
            head_dim=_gguf_head_dim(given),
            ffn_dim=_size(given, "feed_forward_length"),
            vocab_size=vocab_size,
            norm_eps=_number(given, "attention.layer_norm_rms_epsilon"),
            rope_theta=_gguf_theta(given),
            rope_scaling=_gguf_scaling(given, divisors_P),
            rope_pairing="interleaved",  # converters permute the rows of q and k to Meta's order
            tied=tied,
            context_length=_size(given, "context_length"),
        )


def _gguf_settings(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The keys llama.* without their prefix, none of them unknown or unsupported."""
    _only(metadata, {"general.architecture": "llama", "general.type": "model"})
    _present(metadata, "general.architecture", None)
    given = {k[len("llama.") :]: v for k, v in metadata.items() if k.startswith("llama.")}
    _only(given, _GGUF_NEUTRAL | {"vocab_size": vocab_size})
    _known(given, (*_GGUF_READ, *_GGUF_NEUTRAL, *_GGUF_HARMLESS), "the key llama.*")
    return given


def _gguf_head_dim(given: Mapping[str, Any]) -> int:
    """The head size: key_length or width / heads; all of it is turned, and values have it too."""
    key_length = given.get("attention.key_length")
    head_dim = (
        _head_dim(_size(given, "embedding_length"), _size(given, "attention.head_count"))
        if key_length is None
        else _size(given, "attention.key_length")
    )
    _only(given, {"attention.value_length": head_dim, "rope.dimension_count": head_dim})
    return head_dim


def _gguf_theta(given: Mapping[str, Any]) -> float:
    theta = _number(given, "rope.freq_base", 10000.0)
    if theta <= 0:
        raise InputError(f"rope.freq_base: expected a number above 0, found {theta}")
    return theta


def _gguf_scaling(given: Mapping[str, Any], divisors_P: np.ndarray | None) -> RopeScaling | None:
    old_context = _size(given, "rope.scaling.original_context_length", LLAMA3_OLD_CONTEXT)
    return scaling_from_divisors(divisors_P, _gguf_theta(given), _gguf_head_dim(given), old_context)


def scaling_from_divisors(
    divisors_P: np.ndarray | None, theta: float, head_dim: int, old_context: int
) -> RopeScaling | None:
    """The "llama3" scaling, with low 1 and high 4, that a GGUF file's frequency divisors express.

    None for no divisors or all ones. Raises InputError for divisors that no such scaling
    explains to 1e-5: they are of another kind (longrope, for instance).
    """
    if divisors_P is None:
        return None
    factor = float(str(divisors_P.max()))  # the decimal that was rounded to the tensor's float32
    if divisors_P.shape == (head_dim // 2,) and 1 <= factor < math.inf and divisors_P.min() >= 1:
        scaling = RopeScaling(factor, 1.0, 4.0, old_context)
        if np.allclose(divisors_P, scaling.divisors_P(theta, head_dim), rtol=1e-5, atol=0):
            return scaling if factor > 1 else None
    raise InputError(
        f"RoPE divisors: expected {head_dim // 2} that a llama3 scaling with low 1, high 4 and old "
        f"context {old_context} explains, found {len(divisors_P)} others, at most {factor}"
    )


# ---- llama2.c header -------------------------------------------------------------------------


def from_llama2c(header: Sequence[int], tied: bool, source: str) -> Config:
    """The Config of a llama2.c checkpoint: dim, hidden_dim, layers, heads, kv heads, vocab, length.

    The file does not say them, but llama2.c has them as literals: theta 10000, epsilon 1e-5.
    """
    names = ("dim", "ffn_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "context_length")
    with _naming(source):
        named = dict(zip(names, header, strict=True))
        D, F, L, N, K, V, context = (_size(named, name) for name in names)
        return Config(D, L, N, K, _head_dim(D, N), F, V, tied=tied, context_length=context)
