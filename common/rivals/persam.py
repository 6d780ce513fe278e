"""PerSAM: segmentation of what one or more reference images show, without training.

Zhang et al., "Personalize Segment Anything Model with One Shot", arXiv 2305.03048. All of it runs
on cached embeddings, one image at a time. Weights and layers are those of segment_anything, and
none is changed. Of the three passes only the first differs from SAM: `guided_transformer` walks
the layers of SAM's transformer itself.
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam, TwoWayTransformer
from segment_anything.modeling.transformer import Attention
from torch import Tensor

from common.layers import merge_heads, split_heads


class PerSAM:
    """Segments what the references show: `target` once, then `segment` image by image."""

    def __init__(self, sam: Sam, frame: int = 800) -> None:
        """frame: side in pixels of the square that points and boxes lie in."""
        self.sam, self.frame = sam, frame
        self.scale = sam.image_encoder.img_size / frame  # as in BatchedPrompter
        self.image_pe = sam.prompt_encoder.get_dense_pe()
        self.labels = torch.tensor([[1, 0]], device=sam.device)

    def target(self, embeddings: Tensor, truth: Tensor) -> Tensor:
        """The target embedding: the mean over the references of each one's mean over its object.

        embeddings: (S, C, h, w), any float type. truth: (S, h, w), the foreground share of each
        cell in [0, 1], or -1 where it is unknown. Every reference must hold some foreground.
        If no cell of a reference is more than half foreground, its fullest cells count instead.
        Returns float32 (C,) on SAM's device, not normalised.
        """
        means = []
        for embedding, share in zip(embeddings, truth, strict=True):
            cells = share > 0.5 if share.max() > 0.5 else share == share.max()
            means.append(embedding[:, cells.to(embedding.device)].float().mean(1))
        return torch.stack(means).mean(0).to(self.sam.device)

    @torch.no_grad()
    def segment(self, embedding: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Segments one image.

        embedding: (C, h, w), any float type. target: (C,) from `target`. Returns the mask's
        low-resolution logits, float32 (4h, 4w), and the two points that prompted it, (2, 2) as
        (x, y) in pixels of the frame, positive first. Both lie on SAM's device.
        """
        embedding = embedding.to(self.sam.device).float()
        target = target.to(self.sam.device).float()
        unit_features, unit_target = F.normalize(embedding, dim=0), F.normalize(target, dim=0)
        cosine = torch.einsum("chw,c->hw", unit_features, unit_target)
        similarity = stretch(cosine, (self.frame, self.frame))
        points = extreme_points(similarity)
        attention = stretch(standardise(similarity), cosine.shape).sigmoid()
        logits = self.guided_pass(embedding, points, attention, target)
        logits = self.refine(embedding, points, logits, None)
        return self.refine(embedding, points, logits, self.box(logits)), points

    def guided_pass(self, embedding: Tensor, points: Tensor, attention: Tensor | None,
                    target: Tensor) -> Tensor:
        """The first pass: MaskDecoder.predict_masks with the guided transformer.

        Only the single-mask token is decoded. points: (2, 2) in the frame. attention, target: as
        in `guided_transformer`. Returns logits (4h, 4w).
        """
        decoder = self.sam.mask_decoder
        prompt = points[None] * self.scale, self.labels
        sparse, dense = self.sam.prompt_encoder(prompt, boxes=None, masks=None)
        output_tokens = [decoder.iou_token.weight, decoder.mask_tokens.weight]
        tokens = torch.cat([*output_tokens, sparse[0]])[None]
        queries, keys = guided_transformer(decoder.transformer, embedding + dense, self.image_pe,
                                           tokens, attention, target)
        upscaled = decoder.output_upscaling(keys.transpose(1, 2).reshape(dense.shape))
        single_mask = queries[:, 1]  # token 0 is the IoU's
        hyper_in = decoder.output_hypernetworks_mlps[0](single_mask)
        return torch.einsum("bc,bchw->bhw", hyper_in, upscaled)[0]

    def refine(self, embedding: Tensor, points: Tensor, logits: Tensor,
               box: Tensor | None) -> Tensor:
        """A further pass, which is SAM's own, with the last mask as a prompt beside the points.

        logits: (4h, 4w) of the pass before. box: (4,) in the frame, or None. Returns the logits
        (4h, 4w) of that one of SAM's three masks whose predicted IoU is the highest.
        """
        prompt = points[None] * self.scale, self.labels
        boxes = None if box is None else box[None] * self.scale
        sparse, dense = self.sam.prompt_encoder(prompt, boxes=boxes, masks=logits[None, None])
        masks, iou = self.sam.mask_decoder(embedding[None], self.image_pe, sparse, dense,
                                           multimask_output=True)
        return masks[0, iou[0].argmax()]

    def box(self, logits: Tensor) -> Tensor | None:
        """The box x0, y0, x1, y1 of the mask's outermost pixels in the frame; None if it is empty.

        The mask is made from the logits (4h, 4w) as SamPredictor makes it.
        """
        image_size = self.sam.image_encoder.img_size
        full_size = self.sam.postprocess_masks(logits[None, None], (image_size, image_size),
                                               (self.frame, self.frame))[0, 0]
        pixels = (full_size > self.sam.mask_threshold).nonzero().flip(1).float()
        return torch.cat([pixels.amin(0), pixels.amax(0)]) if len(pixels) else None


def stretch(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes a map (h, w) to `size`, bilinear."""
    return F.interpolate(values[None, None], size, mode="bilinear")[0, 0]


def extreme_points(similarity: Tensor) -> Tensor:
    """(x, y) of the highest and of the lowest pixel of a map (H, W), float (2, 2).

    SAM's prompt encoder adds the half pixel.
    """
    pixels = torch.stack([similarity.argmax(), similarity.argmin()])
    width = similarity.shape[1]
    return torch.stack([pixels % width, pixels // width], 1).float()


def standardise(similarity: Tensor) -> Tensor:
    """Shifts and scales a map to mean 0 and (unbiased) standard deviation 1.

    A constant map, which prefers no place, becomes about 0.
    """
    return (similarity - similarity.mean()) / similarity.std().clamp(min=1e-6)


def guided_transformer(transformer: TwoWayTransformer, image: Tensor, image_pe: Tensor,
                       tokens: Tensor, attention: Tensor | None,
                       target: Tensor) -> tuple[Tensor, Tensor]:
    """TwoWayTransformer.forward with target-guided attention and target-semantic prompting.

    image, image_pe: (1, C, h, w). tokens: (1, n, C). attention: (h, w), the similarity in [0, 1],
    or None for SAM's own attention. target: (C,), not normalised; zeros for no prompting. Returns
    queries (1, n, C) and keys (1, h w, C).
    """
    keys, key_pe = image.flatten(2).transpose(1, 2), image_pe.flatten(2).transpose(1, 2)
    # The authors' code adds the target to the queries in place. Before the first block the queries
    # are the same tensor as the tokens' positional term, which is used all along. So the target
    # enters that term too and stays there.
    queries, query_pe = tokens, tokens + target
    for block in transformer.layers:
        queries = queries + target
        if block.skip_first_layer_pe:
            queries = block.norm1(block.self_attn(queries, queries, queries))
        else:
            q = queries + query_pe
            queries = block.norm1(queries + block.self_attn(q, q, queries))
        q, k = queries + query_pe, keys + key_pe
        attended = guided_attention(block.cross_attn_token_to_image, q, k, keys, attention)
        queries = block.norm2(queries + attended)
        queries = block.norm3(queries + block.mlp(queries))
        q = queries + query_pe
        keys = block.norm4(keys + block.cross_attn_image_to_token(k, q, queries))
    q, k = queries + query_pe + target, keys + key_pe
    attended = transformer.final_attn_token_to_image(q, k, keys)
    return transformer.norm_final_attn(queries + attended), keys


def guided_attention(layer: Attention, q: Tensor, k: Tensor, v: Tensor,
                     attention: Tensor | None) -> Tensor:
    """Attention.forward with `attention` (h, w) added to the weights of each token.

    q: (1, n, C). k, v: (1, h w, C). Returns (1, n, C). With None it is SAM's own attention.
    """
    if attention is None:
        return layer(q, k, v)
    q = split_heads(layer.q_proj(q), layer.num_heads)
    k = split_heads(layer.k_proj(k), layer.num_heads)
    v = split_heads(layer.v_proj(v), layer.num_heads)
    weights = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)
    # The authors' code adds the similarity after the softmax and takes a second one. The sums lie
    # within [0, 2], so this is nearly an even average over the image: no cell weighs more than
    # e^2 = 7.4 times another.
    weights = (weights + attention.flatten()).softmax(3)
    return layer.out_proj(merge_heads(weights @ v))
