"""What the compiler makes of each row of the zoo, where it isn't two rings and no more.

A row that gets better or worse fails its test until this table says so.
"""

from dataclasses import dataclass

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


NOT_READ = "a mask or bias that isn't a function of positions"
ONE_TOKEN = "a sequence of one token, or of none, can't be cut over ranks"
EXPERTS = ("aten.histc", "aten.index", "aten.sort")


def _gathered(reason: str, number: int = 2) -> Expected:
    return Expected(rings=0, gathered=number, reason=reason)


def _gathers(*ops: str) -> Expected:
    return Expected(gathers=ops)


def _rings(number: int) -> Expected:
    return Expected(rings=number)


PAIRED = (
    *("t5", "t5 gated", "mt5", "umt5", "bart", "mbart", "pegasus", "marian"),
    *("blenderbot", "m2m_100", "plbart", "whisper"),
)
WAVE = Expected(
    gathers=("aten.conv1d",),
    num_graphs=3,
    note="in training, layers are left out at random: graph breaks",
)

EXPECTED: dict[str, Expected] = {
    # Decoders.
    "diffllama": _rings(4),
    "mixtral": _gathers(*EXPERTS),
    "minimax": Expected(rings=1, gathers=(*EXPERTS, "aten.slice")),
    "qwen2_moe": _gathers(*EXPERTS),
    "qwen3_moe": _gathers(*EXPERTS),
    "olmoe": _gathers(*EXPERTS),
    "granitemoe": _gathers(*EXPERTS, "aten.type_as"),
    "gpt_oss": _gathers(*EXPERTS),
    "deepseek_v2": _gathers(*EXPERTS, "aten.new_empty", "aten.view_as_complex"),
    "deepseek_v3": _gathers(*EXPERTS, "aten.new_empty"),
    "jamba": Expected(rings=0, note="a scan: the whole graph runs on every rank"),
    "lfm2": Expected(rings=1, gathers=("aten.conv1d",)),
    "gpt_neo": _gathered("a query may have no key"),
    "opt": _gathers("aten.cumsum"),
    "bloom": Expected(
        rings=0, note="an autograd.Function: the whole graph runs on every rank"
    ),
    # Encoders.
    "deberta_v2": _gathers("aten.gather"),
    "longformer": Expected(
        rings=0,
        num_graphs=4,
        note="its own sliding chunks, which no softmax of scores of all keys is",
    ),
    "mobilebert": _gathers("aten.pad"),
    "squeezebert": _gathers("aten.conv1d"),
    "roformer": _gathers("aten.reshape_as"),
    "convbert": _gathers("aten.conv1d", "aten.im2col"),
    "fnet": Expected(rings=0, note="no attention: Fourier transforms"),
    "xlnet": _gathers("aten.slice"),
    # Encoder-decoders.
    **dict.fromkeys(PAIRED, _rings(6)),
    "switch_transformers": Expected(rings=6, num_graphs=8),
    # Sound.
    **dict.fromkeys(("wav2vec2", "hubert", "wavlm", "unispeech"), WAVE),
    # Vision.
    "dinov3_vit": _gathers("aten.split_with_sizes"),
    "ijepa": _gathers("aten.add"),
    "swin": Expected(rings=4, gathers=("aten.view",)),
    "swinv2": Expected(2, 2, NOT_READ, ("aten.view",)),
    "clip": _rings(4),
    "siglip": Expected(rings=4, gathers=("aten.add",)),
    "videomae": _gathers("aten.add"),
    "llava": Expected(rings=4, num_graphs=7),
    # timm.
    "timm vit_base_patch16_siglip_224 [sdpa]": Expected(2, 1, ONE_TOKEN, ("aten.add",)),
    "timm vit_base_patch16_siglip_224 [eager]": _gathers("aten.add"),
    "timm eva02_tiny_patch14_224": _gathers("aten.cat", "aten.slice"),
    "timm cait_xxs24_224 [sdpa]": _gathered(ONE_TOKEN),
    "timm cait_xxs24_224 [eager]": Expected(
        rings=0, note="scores of all heads are mixed; then one query, the class"
    ),
    "timm xcit_nano_12_p8_224 [sdpa]": Expected(
        2, 2, ONE_TOKEN, note="attention over channels, which are cut"
    ),
    "timm xcit_nano_12_p8_224 [eager]": Expected(
        rings=0, note="attention over channels; then one query, the class"
    ),
    "timm swin_tiny_patch4_window7_224 [sdpa]": Expected(4, gathers=("aten.view",)),
    "timm swin_tiny_patch4_window7_224 [eager]": Expected(
        2, 2, NOT_READ, ("aten.view",)
    ),
    # torch.nn.
    "nn.TransformerDecoder": _rings(4),
    "nn.Transformer": _rings(6),
    "nn.MultiheadAttention": _rings(1),
    "nn.MultiheadAttention with weights": _gathered("whose weights are also used", 1),
}


def find_expected(name: str, attention: Attention) -> Expected:
    """What becomes of a row by one implementation."""
    usual = EXPECTED.get(name, Expected())
    return EXPECTED.get(f"{name} [{attention}]", usual)
