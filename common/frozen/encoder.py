"""SAM's ViT image encoder with fused attention: the same layers and weights, less memory traffic.

segment_anything writes out every attention map (4,096 x 4,096 numbers a head in the global blocks),
adds the decomposed relative positions to it twice, and takes its softmax: on a CPU that takes
longer than the products themselves. Here the relative positions are the additive bias of torch's
fused attention, one head at a time, so that no more than one head's bias is ever in memory.
"""

import torch
from segment_anything.modeling.image_encoder import (
    Attention,
    Block,
    ImageEncoderViT,
    get_rel_pos,
    window_partition,
    window_unpartition,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.layers import merge_heads


def attend(attention: Attention, x: Tensor) -> Tensor:
    """`Attention.forward`: x (B, H, W, C) to the same shape."""
    batch, height, width, channels = x.shape
    qkv = attention.qkv(x).reshape(batch, height * width, 3, attention.num_heads, -1)
    qkv = qkv.permute(3, 2, 0, 1, 4)  # (n, 3, B, HW, d), n heads
    q = qkv[:, 0]
    # (H, H, d), by the query's and the key's row; (W, W, d), by their columns
    rows = get_rel_pos(height, height, attention.rel_pos_h).to(q.dtype)
    columns = get_rel_pos(width, width, attention.rel_pos_w).to(q.dtype)
    places = q.unflatten(2, (height, width))  # (n, B, H, W, d)
    row_terms = places @ rows.transpose(1, 2)  # (n, B, H, W, H)
    column_terms = places.transpose(2, 3) @ columns.transpose(1, 2)
    column_terms = column_terms.transpose(2, 3)  # (n, B, H, W, W)
    heads = []  # (B, 1, HW, d) each
    for head, row, column in zip(qkv, row_terms, column_terms):
        bias = row[..., :, None] + column[..., None, :]  # (B, H, W, H, W)
        bias = bias.reshape(batch, 1, height * width, height * width)
        heads.append(F.scaled_dot_product_attention(*head[:, :, None], attn_mask=bias))
    return attention.proj(merge_heads(torch.cat(heads, 1)).reshape(batch, height, width, channels))


def apply_block(block: Block, x: Tensor) -> Tensor:
    """`Block.forward`: x (B, H, W, C) to the same shape."""
    y, whole = block.norm1(x), x.shape[1:3]
    if block.window_size:
        y, padded = window_partition(y, block.window_size)
    y = attend(block.attn, y)
    if block.window_size:
        y = window_unpartition(y, block.window_size, padded, whole)
    x = x + y
    return x + block.mlp(block.norm2(x))


def encode(encoder: ImageEncoderViT, images: Tensor) -> Tensor:
    """`ImageEncoderViT.forward`.

    images: (B, 3, s, s), preprocessed. Returns embeddings (B, C, s / 16, s / 16). Where gradients
    are taken, each block is computed once more on the way back, so that only one block's attention
    is in memory at a time.
    """
    x = encoder.patch_embed(images) + encoder.pos_embed
    for block in encoder.blocks:
        if torch.is_grad_enabled():
            x = checkpoint(apply_block, block, x, use_reentrant=False,
                           preserve_rng_state=False)  # nothing is random, and threads share it
        else:
            x = apply_block(block, x)
    return encoder.neck(x.permute(0, 3, 1, 2))
