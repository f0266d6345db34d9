"""Torch's own context parallelism, by its two ways in: the peers' part of torch.

``context_parallel`` rings SDPA; flex attention gathers all keys and values. Both cut
the sequence by head and tail, which is zigzag.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import _context_parallel, context_parallel
from torch.distributed.tensor.experimental._attention import set_rotate_method
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

_of_torch = _context_parallel._attention  # noqa: SLF001 - there is no public name
_balancers = _context_parallel._load_balancer  # noqa: SLF001 - nor here

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class _Flex(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
        out: Tensor = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
        return out


@contextmanager
def ring_sdpa(
    mesh: DeviceMesh, buffers: Sequence[Tensor], dims: Sequence[int], rotate: str
) -> Iterator[None]:
    """Make SDPA a ring, by cuDNN, and cut ``buffers`` along ``dims`` meanwhile."""
    set_rotate_method(rotate)
    cut = context_parallel(mesh, buffers=list(buffers), buffer_seq_dims=list(dims))
    with cut, use_cudnn(mesh):
        yield


def use_cudnn(mesh: DeviceMesh) -> AbstractContextManager[Any]:
    """On GPUs; on CPU torch's own kernel."""
    on_gpu = mesh.device_type == "cuda"
    return sdpa_kernel(
        SDPBackend.CUDNN_ATTENTION if on_gpu else SDPBackend.FLASH_ATTENTION
    )


def compile_flex(mesh: DeviceMesh) -> Callable[..., Tensor]:
    """Attention of this rank's q, k, v and block mask over all keys."""
    torch.compiler.reset()
    way = _of_torch._ContextParallel  # noqa: SLF001 - there is no public name
    plan = way(seq_dim=2, attention_type=way.AttentionType.FLEX)
    module = plan._apply(_Flex(), mesh)  # noqa: SLF001 - as parallelize_module does
    return torch.compile(module)


def cut_block_mask(mask_mod: MaskMod, total: int, mesh: DeviceMesh) -> BlockMask:
    """This rank's queries of a mask over ``total`` tokens, that has no heads."""
    balancer = _balancers._HeadTailLoadBalancer(  # noqa: SLF001 - no public name
        total, mesh.size(), mesh.device_type
    )
    return _of_torch._create_cp_block_mask(  # noqa: SLF001 - no public name
        mask_mod, 1, 1, total, total, mesh, load_balancer=balancer
    )
