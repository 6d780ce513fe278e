"""SAM's mask decoder for different images side by side, with one mask each.

Weights and layers are segment_anything's (`TwoWayTransformer`, `MaskDecoder`); the results equal
theirs to rounding. What differs is the work: the official decoder repeats one image for many
prompts, projects the untouched embedding in every call, adds the positional encoding to it each
time, and upsamples for four masks. Here all that no point changes is computed once per image, and
layers that read the same input are one matrix product.
"""

from typing import NamedTuple

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from common.layers import attention, split_heads

PLACES = 1024  # upscaled at a time: what they become fits into a core's cache


class ImageSide(NamedTuple):
    """What the decoder computes from B images alone, before the first point.

    keys is the embedding with the "no mask" prompt added, the others are the first block's
    projections of it, in n heads of d channels.
    """

    keys: Tensor  # (B, h w, C)
    to_image_k: Tensor  # (B, n, h w, d), where tokens attend to the image
    to_token_q: Tensor  # (B, n, h w, d), where the image attends to the tokens
    to_image_v: Tensor  # (B, n, h w, d)


class ImageProjections:
    """Linear layers of the same keys, some of which see them with their positional encoding.

    The projection of keys + pe is that of keys plus a constant, so all layers are one product and
    one addition.
    """

    def __init__(self, pe: Tensor, with_pe: list[nn.Linear], without: list[nn.Linear],
                 heads: int) -> None:
        """pe: (h w, C). heads: of the attentions that read the answers."""
        layers, self.heads = [*with_pe, *without], heads
        self.weight = torch.cat([layer.weight for layer in layers]).T.contiguous()
        constants = [layer(pe) for layer in with_pe]
        constants += [layer.bias.expand(len(pe), -1) for layer in without]
        self.constant = torch.cat(constants, 1)
        self.widths = [layer.out_features for layer in layers]

    def __call__(self, keys: Tensor) -> list[Tensor]:
        """keys (B, h w, C) to (B, n, h w, d) for each layer, `with_pe` before `without`."""
        projected = (keys @ self.weight).add_(self.constant)
        return [split_heads(part, self.heads) for part in projected.split(self.widths, 2)]


class SingleMaskDecoder:
    """MaskDecoder.predict_masks of mask token 0, image by image, in two steps.

    `prepare` is called once an episode, `decode` every round.
    """

    @torch.no_grad()
    def __init__(self, sam: Sam) -> None:
        self.decoder, self.transformer = sam.mask_decoder, sam.mask_decoder.transformer
        self.height, self.width = sam.prompt_encoder.image_embedding_size
        self.no_mask = sam.prompt_encoder.no_mask_embed.weight  # (1, C), the dense prompt
        pe = sam.prompt_encoder.get_dense_pe().flatten(2).transpose(1, 2)[0]  # (h w, C)
        self.projections = []  # of each block: k and q for the positional keys, v
        for block in self.transformer.layers:
            to_image, to_token = block.cross_attn_token_to_image, block.cross_attn_image_to_token
            self.projections.append(ImageProjections(
                pe, [to_image.k_proj, to_token.q_proj], [to_image.v_proj], to_image.num_heads))
        final = self.transformer.final_attn_token_to_image
        self.final_projections = ImageProjections(
            pe, [final.k_proj], [final.v_proj], final.num_heads)

    @torch.no_grad()
    def prepare(self, embeddings: Tensor) -> ImageSide:
        """The image side of embeddings (B, C, h, w) float32 on SAM's device."""
        keys = embeddings.flatten(2).transpose(1, 2) + self.no_mask
        return ImageSide(keys, *self.projections[0](keys))

    def upscale(self, keys: Tensor, hyper_in: Tensor) -> Tensor:
        """Logits (B, P, 4, 4) of P places, of which `output_upscaling` makes 4 x 4 each.

        keys: (B, P, C). hyper_in: (B, C / 8), what a fine place is multiplied with. A 2 x 2
        transposed convolution of stride 2 is a linear layer to four places.
        """
        first, norm, activation, second, _ = self.decoder.output_upscaling
        fine = transposed(first, keys)  # (B, P, 4, C / 4)
        fine = activation(F.layer_norm(fine, fine.shape[3:], norm.weight, norm.bias, norm.eps))
        fine = activation(transposed(second, fine))  # (B, P, 4, 4, C / 8)
        return torch.einsum("bpijc,bc->bpij", fine, hyper_in)

    @torch.no_grad()
    def decode(self, image: ImageSide, sparse: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits (B, 4h, 4w) and predicted IoU (B,).

        sparse: (B, N, C), the points as the prompt encoder embeds them.
        """
        decoder, transformer = self.decoder, self.transformer
        output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        query_pe = torch.cat([output_tokens.expand(len(sparse), -1, -1), sparse], 1)
        queries, keys = query_pe, image.keys
        for index, block in enumerate(transformer.layers):  # TwoWayAttentionBlock.forward
            to_image, to_token = block.cross_attn_token_to_image, block.cross_attn_image_to_token
            if block.skip_first_layer_pe:
                queries = block.norm1(block.self_attn(queries, queries, queries))
            else:
                q = queries + query_pe
                queries = block.norm1(queries + block.self_attn(q, q, queries))
            image_k, image_q, image_v = image[1:] if index == 0 else self.projections[index](keys)
            q = split_heads(to_image.q_proj(queries + query_pe), to_image.num_heads)
            queries = block.norm2(queries + to_image.out_proj(attention(q, image_k, image_v)))
            queries = block.norm3(queries + block.mlp(queries))
            k = split_heads(to_token.k_proj(queries + query_pe), to_token.num_heads)
            v = split_heads(to_token.v_proj(queries), to_token.num_heads)
            attended = attention_to_few(image_q, k, v)
            keys = block.norm4(to_token.out_proj(attended).add_(keys))
        final = transformer.final_attn_token_to_image
        q = split_heads(final.q_proj(queries + query_pe), final.num_heads)
        k, v = self.final_projections(keys)
        queries = transformer.norm_final_attn(queries + final.out_proj(attention(q, k, v)))

        hyper_in = decoder.output_hypernetworks_mlps[0](queries[:, 1])  # token 0 is the IoU's
        logits = torch.cat([self.upscale(some, hyper_in) for some in keys.split(PLACES, 1)], 1)
        # (B, row, column, i, j, k, l): i and k are the two halvings of a row, j and l of a column
        logits = logits.view(-1, self.height, self.width, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
        logits = logits.reshape(-1, 4 * self.height, 4 * self.width)
        return logits, decoder.iou_prediction_head(queries[:, 0])[:, 0]


def transposed(layer: torch.nn.ConvTranspose2d, places: Tensor) -> Tensor:
    """ConvTranspose2d(C, D, 2, 2) of places (..., C): (..., 4, D), the four that each becomes."""
    weight = layer.weight.flatten(2).permute(2, 1, 0).flatten(0, 1)  # (C, D, 2, 2) to (4 D, C)
    return F.linear(places, weight, layer.bias.repeat(4)).unflatten(-1, (4, -1))


def attention_to_few(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`layers.attention` of many queries to few keys: (B, n, N, d) and (B, n, M, d) to (B, N, n d).

    torch's fused kernels are made for many keys. Here the queries lie along the last dimension, so
    that softmax and both products run over long rows.
    """
    scores = k * k.shape[3] ** -0.5 @ q.transpose(2, 3)  # (B, n, M, N)
    return (v.transpose(2, 3) @ scores.softmax(2)).flatten(1, 2).transpose(1, 2)
