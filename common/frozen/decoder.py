"""SAM's mask decoder for different images side by side, one mask each; what no point changes is computed once an image.

Weights and layers are segment_anything's (`TwoWayTransformer`, `MaskDecoder`); the results equal theirs to rounding.
What differs is the work: the official decoder repeats one image for many prompts, projects the untouched embedding in
every call, adds the positional code to it each time, and upsamples for four masks.
"""

from typing import NamedTuple

import torch
from segment_anything.modeling import Sam
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor
from torch.nn import functional as F


class ImageSide(NamedTuple):
    """What the decoder computes from B images alone, before the first point; attentions have n heads of d channels."""

    keys: Tensor  # (B, h w, C): the embedding with the "no mask" prompt added
    to_image_k: Tensor  # (B, n, h w, d): the first block's projections of it, where tokens attend to the image
    to_image_v: Tensor  # (B, n, h w, d)
    to_token_q: Tensor  # (B, n, h w, d): and where the image attends to the tokens


class SingleMaskDecoder:
    """MaskDecoder.predict_masks of mask token 0, image by image, in two steps: `prepare` once, `decode` every round."""

    def __init__(self, sam: Sam) -> None:
        self.decoder, self.transformer = sam.mask_decoder, sam.mask_decoder.transformer
        self.height, self.width = sam.prompt_encoder.image_embedding_size
        self.no_mask = sam.prompt_encoder.no_mask_embed.weight  # (1, C), the dense prompt at every place
        pe = sam.prompt_encoder.get_dense_pe().flatten(2).transpose(1, 2)[0]  # (h w, C)
        # the projection of keys + pe is that of keys plus a constant, made here once for each layer that needs it
        places = [block.cross_attn_token_to_image.k_proj for block in self.transformer.layers]
        places += [block.cross_attn_image_to_token.q_proj for block in self.transformer.layers]
        places.append(self.transformer.final_attn_token_to_image.k_proj)
        with torch.no_grad():
            self.constant = {layer: layer(pe) for layer in places}

    def with_pe(self, layer: torch.nn.Linear, keys: Tensor) -> Tensor:
        """layer(keys + pe), (B, h w, D)."""
        return keys @ layer.weight.T + self.constant[layer]

    @torch.no_grad()
    def prepare(self, embeddings: Tensor) -> ImageSide:
        """The image side of embeddings (B, C, h, w) float32 on SAM's device."""
        keys = embeddings.flatten(2).transpose(1, 2) + self.no_mask
        return ImageSide(keys, *self.project(self.transformer.layers[0], keys))

    def project(self, block: TwoWayAttentionBlock, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the cross-attentions of a block need of the image: k and v for the tokens, q towards them."""
        to_image, to_token = block.cross_attn_token_to_image, block.cross_attn_image_to_token
        return (heads(to_image, self.with_pe(to_image.k_proj, keys)), heads(to_image, to_image.v_proj(keys)),
                heads(to_token, self.with_pe(to_token.q_proj, keys)))

    @torch.no_grad()
    def decode(self, image: ImageSide, sparse: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, 4h, 4w) and predicted IoU (B,) for the prompt encoder's sparse prompts (B, N, C)."""
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
            image_k, image_v, image_q = image[1:] if index == 0 else self.project(block, keys)
            q = heads(to_image, to_image.q_proj(queries + query_pe))
            queries = block.norm2(queries + attend(to_image, q, image_k, image_v))
            queries = block.norm3(queries + block.mlp(queries))
            k, v = heads(to_token, to_token.k_proj(queries + query_pe)), heads(to_token, to_token.v_proj(queries))
            keys = block.norm4(keys + attend(to_token, image_q, k, v))
        final = transformer.final_attn_token_to_image
        q = heads(final, final.q_proj(queries + query_pe))
        k = heads(final, self.with_pe(final.k_proj, keys))
        v = heads(final, final.v_proj(keys))
        queries = transformer.norm_final_attn(queries + attend(final, q, k, v))

        # output_upscaling, place by place: a 2 x 2 transposed convolution of stride 2 is a linear layer to four places
        first, norm, activation, second, _ = decoder.output_upscaling
        fine = transposed(first, keys)  # (B, h w, 4, C / 4)
        fine = activation(F.layer_norm(fine, fine.shape[3:], norm.weight, norm.bias, norm.eps))
        fine = activation(transposed(second, fine))  # (B, h w, 4, 4, C / 8)
        logits = torch.einsum("bpijc,bc->bpij", fine, decoder.output_hypernetworks_mlps[0](queries[:, 1]))
        logits = logits.view(-1, self.height, self.width, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
        return logits.reshape(-1, 4 * self.height, 4 * self.width), decoder.iou_prediction_head(queries[:, 0])[:, 0]


def heads(attention: Attention, projected: Tensor) -> Tensor:
    """(B, N, n d) to (B, n, N, d)."""
    return projected.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)


def attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention.forward after its projections, (B, n, N, d) each, to (B, N, C)."""
    return attention.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def transposed(layer: torch.nn.ConvTranspose2d, places: Tensor) -> Tensor:
    """A ConvTranspose2d(C, D, 2, 2) of places (..., C): the four places that each becomes, (..., 4, D), row by row."""
    weight = layer.weight.flatten(2).permute(2, 1, 0).flatten(0, 1)  # (C, D, 2, 2) to (4 D, C)
    return F.linear(places, weight, layer.bias.repeat(4)).unflatten(-1, (4, -1))
