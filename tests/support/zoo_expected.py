"""What the compiler makes of each row of the zoo, where it isn't two rings and no more.

A row that gets better or worse fails its test until this table says so.
"""

from dataclasses import dataclass, replace

from support.zoo_rows import Attention


@dataclass(frozen=True, slots=True)
class Expected:
    """What becomes of one row.

    Attributes:
        rings: attentions that become rings.
        gathered: attentions that don't.
        reason: of those, a part of the compiler's text.
        gathers: other ops that need a whole value, each once.
        error: a part of the error that the compiler refuses the whole model with.
        num_graphs: graphs that Dynamo makes.
        note: why, where the compiler has nothing to say.
    """

    rings: int = 2
    gathered: int = 0
    reason: str = ""
    gathers: tuple[str, ...] = ()
    error: str = ""
    num_graphs: int = 1
    note: str = ""


CROSS = "attention between sequences of different lengths isn't built yet"
THREE_DIMS = "only torch.matmul on 4-D tensors is built so far"
IN_PLACE = "changed in place"
WRITTEN = "writes in place to a value that is cut over the ranks"
PATCHES = "its sequence dim is no single extent that can be cut"
NOT_READ = "a mask or bias that isn't a function of positions"
EXPERTS = ("aten.histc", "aten.index", "aten.sort")


def _gathered(reason: str, number: int = 2) -> Expected:
    return Expected(rings=0, gathered=number, reason=reason)


def _gathers(*ops: str) -> Expected:
    return Expected(gathers=ops)


_CROSS_SDPA = Expected(4, 2, CROSS, ("aten.scaled_dot_product_attention",))
_CROSS_EAGER = Expected(4, 2, CROSS, ("aten.matmul",))
_PAIRED = ("bart", "mbart", "pegasus", "marian", "blenderbot", "m2m_100", "plbart")
_T5 = Expected(rings=0, gathered=6)  # for reasons of two kinds
_WAVE = Expected(
    gathers=("aten.conv1d",),
    num_graphs=3,
    note="in training, layers are left out at random: graph breaks",
)

EXPECTED: dict[str, Expected] = {
    # Decoders.
    "gemma2": _gathered("softcap"),
    "diffllama": Expected(rings=4, gathers=("aten.repeat",)),
    "mixtral": Expected(rings=0, error=WRITTEN),
    "qwen2_moe": _gathers(*EXPERTS),
    "qwen3_moe": _gathers(*EXPERTS),
    "olmoe": _gathers(*EXPERTS),
    "granitemoe": _gathers(*EXPERTS, "aten.type_as"),
    "gpt_oss": _gathered("attention whose weights are also used"),
    "deepseek_v2": _gathered(IN_PLACE),
    "deepseek_v3": _gathered(IN_PLACE),
    "minimax": Expected(rings=0, error=WRITTEN),
    "jamba": Expected(rings=1, gathers=(*EXPERTS, "aten.conv1d", "aten.movedim")),
    "lfm2": Expected(rings=1, gathers=("aten.conv1d",)),
    "gpt_neo": _gathered("a query may have no key"),
    "opt": _gathers("aten.cumsum"),
    "bloom": Expected(
        rings=0, note="an autograd.Function: the whole graph runs on every rank"
    ),
    "falcon": _gathers("aten.index"),
    "falcon alibi": _gathered(NOT_READ),
    "mpt": _gathered(NOT_READ),
    "xglm": _gathered(THREE_DIMS),
    # Encoders.
    "deberta_v2": _gathered(THREE_DIMS),
    "mpnet": _gathered(NOT_READ),
    "modernbert [sdpa]": Expected(
        1, 1, NOT_READ, ("aten.scaled_dot_product_attention", "aten.unbind")
    ),
    "modernbert [eager]": Expected(1, 1, NOT_READ, ("aten.matmul", "aten.unbind")),
    "longformer": Expected(
        rings=0,
        num_graphs=4,
        note="its own sliding chunks, which no softmax of scores of all keys is",
    ),
    "mobilebert": _gathers("aten.slice"),
    "squeezebert": _gathers("aten.conv1d"),
    "layoutlm": _gathered(NOT_READ),
    "roformer": _gathers("aten.reshape_as"),
    "convbert": _gathers("aten.conv1d", "aten.im2col"),
    "fnet": Expected(rings=0, note="no attention: Fourier transforms"),
    "xlnet": _gathered(NOT_READ),
    # Encoder-decoders.
    "t5": _T5,
    "t5 gated": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "switch_transformers": replace(_T5, num_graphs=8),
    **{f"{name} [sdpa]": _CROSS_SDPA for name in (*_PAIRED, "whisper")},
    **{f"{name} [eager]": _CROSS_EAGER for name in (*_PAIRED, "whisper")},
    # Sound.
    "wav2vec2": _WAVE,
    "hubert": _WAVE,
    "wavlm": Expected(0, 2, THREE_DIMS, num_graphs=3),
    "unispeech": _WAVE,
    # Vision.
    "dinov2": _gathers("aten.slice"),
    "dinov2_with_registers": _gathers("aten.slice"),
    "dinov3_vit": _gathers("aten.split_with_sizes"),
    "beit": _gathers("aten.slice"),
    "beit relative": _gathered(NOT_READ),
    "data2vec_vision": _gathered(NOT_READ),
    "ijepa": Expected(rings=0, error=PATCHES),
    "swin": _gathered(NOT_READ, 4),
    "swinv2": _gathered(NOT_READ, 4),
    "clip": Expected(rings=4, gathers=("aten.index",)),
    "siglip": Expected(rings=0, error=PATCHES),
    "videomae": Expected(rings=0, error=PATCHES),
    "llava": Expected(rings=4, num_graphs=7),
    # torch.nn.
    "nn.TransformerEncoder without gradients": Expected(
        rings=0, note="the fast path's own op: the whole graph runs on every rank"
    ),
    "nn.TransformerDecoder": Expected(
        2, 2, CROSS, ("aten.scaled_dot_product_attention",)
    ),
    "nn.Transformer": Expected(4, 2, CROSS, ("aten.scaled_dot_product_attention",)),
    "nn.MultiheadAttention": Expected(rings=1),
    "nn.MultiheadAttention with weights": _gathered(THREE_DIMS, 1),
}


def find_expected(name: str, attention: Attention) -> Expected:
    """What becomes of a row by one implementation."""
    usual = EXPECTED.get(name, Expected())
    return EXPECTED.get(f"{name} [{attention}]", usual)
