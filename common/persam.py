"""PerSAM (Zhang et al., "Personalize Segment Anything Model with One Shot", arXiv 2305.03048), training-free.

All of it runs on cached embeddings, one image at a time. Weights and layers are segment_anything's, and none is
changed: only the first of the three passes is not SAM's own, and for it `guided_transformer` walks the layers itself.
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam, TwoWayTransformer
from segment_anything.modeling.transformer import Attention
from torch import Tensor


class PerSAM:
    """Segments what the references show: `target` once, then `segment` image by image."""

    def __init__(self, sam: Sam, frame: int = 800) -> None:
        """frame: side in pixels of the square that points and boxes lie in."""
        self.sam, self.frame = sam, frame
        self.scale = sam.image_encoder.img_size / frame  # as in BatchedPrompter
        self.image_pe = sam.prompt_encoder.get_dense_pe()
        self.labels = torch.tensor([[1, 0]], device=sam.device)

    def target(self, embeddings: Tensor, truth: Tensor) -> Tensor:
        """The target embedding, float32 (C,) on SAM's device, not normalised: the mean of the references' means.

        embeddings: (S, C, h, w), any float type. truth: (S, h, w) foreground share of each cell in [0, 1], -1 unknown;
        every reference must hold some foreground. One that fills half of no cell counts with its fullest cells.
        """
        means = []
        for embedding, share in zip(embeddings, truth, strict=True):
            cells = share > 0.5 if share.max() > 0.5 else share == share.max()
            means.append(embedding[:, cells.to(embedding.device)].float().mean(1))
        return torch.stack(means).mean(0).to(self.sam.device)

    @torch.no_grad()
    def segment(self, embedding: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The mask's low-resolution logits, float32 (4h, 4w), and its two points (2, 2), on SAM's device.

        embedding: (C, h, w), any float type. target: (C,) from `target`. The points are (x, y) in pixels of the frame,
        positive first.
        """
        embedding, target = embedding.to(self.sam.device).float(), target.to(self.sam.device).float()
        cosine = torch.einsum("chw,c->hw", F.normalize(embedding, dim=0), F.normalize(target, dim=0))
        similarity = stretch(cosine, (self.frame, self.frame))
        points = extreme_points(similarity)
        attention = stretch(standardise(similarity), cosine.shape).sigmoid()
        logits = self.guided_pass(embedding, points, attention, target)
        logits = self.refine(embedding, points, logits, None)
        return self.refine(embedding, points, logits, self.box(logits)), points

    def guided_pass(self, embedding: Tensor, points: Tensor, attention: Tensor | None, target: Tensor) -> Tensor:
        """The first pass: MaskDecoder.predict_masks with the guided transformer, for the single-mask token alone.

        points: (2, 2) in the frame. attention, target: as in `guided_transformer`. Returns logits (4h, 4w).
        """
        decoder = self.sam.mask_decoder
        sparse, dense = self.sam.prompt_encoder((points[None] * self.scale, self.labels), boxes=None, masks=None)
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight, sparse[0]])[None]
        queries, keys = guided_transformer(decoder.transformer, embedding + dense, self.image_pe, tokens, attention,
                                           target)
        upscaled = decoder.output_upscaling(keys.transpose(1, 2).reshape(dense.shape))
        hyper_in = decoder.output_hypernetworks_mlps[0](queries[:, 1])  # token 0 is the IoU's, 1 the single mask's
        return torch.einsum("bc,bchw->bhw", hyper_in, upscaled)[0]

    def refine(self, embedding: Tensor, points: Tensor, logits: Tensor, box: Tensor | None) -> Tensor:
        """A cascaded pass, SAM's own: of three masks (4h, 4w) the one with the best predicted IoU.

        logits: (4h, 4w) of the pass before, now the mask prompt. box: (4,) in the frame, or None.
        """
        sparse, dense = self.sam.prompt_encoder((points[None] * self.scale, self.labels), masks=logits[None, None],
                                                boxes=None if box is None else box[None] * self.scale)
        masks, iou = self.sam.mask_decoder(embedding[None], self.image_pe, sparse, dense, multimask_output=True)
        return masks[0, iou[0].argmax()]

    def box(self, logits: Tensor) -> Tensor | None:
        """x0, y0, x1, y1: the outermost pixels of the mask in the frame, made as by SamPredictor; None if empty."""
        sizes = [(side, side) for side in (self.sam.image_encoder.img_size, self.frame)]
        mask = self.sam.postprocess_masks(logits[None, None], *sizes)[0, 0] > self.sam.mask_threshold
        pixels = mask.nonzero().flip(1).float()
        return torch.cat([pixels.amin(0), pixels.amax(0)]) if len(pixels) else None


def stretch(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(h, w) to `size`, bilinear."""
    return F.interpolate(values[None, None], size, mode="bilinear")[0, 0]


def extreme_points(similarity: Tensor) -> Tensor:
    """(x, y) of the highest and of the lowest pixel, (2, 2) float; SAM's prompt encoder adds the half pixel."""
    pixels = torch.stack([similarity.argmax(), similarity.argmin()])
    return torch.stack([pixels % similarity.shape[1], pixels // similarity.shape[1]], 1).float()


def standardise(similarity: Tensor) -> Tensor:
    """To mean 0 and unbiased deviation 1; a constant map, which prefers no place, to about 0."""
    return (similarity - similarity.mean()) / similarity.std().clamp(min=1e-6)


def guided_transformer(transformer: TwoWayTransformer, image: Tensor, image_pe: Tensor, tokens: Tensor,
                       attention: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
    """TwoWayTransformer.forward with PerSAM's target-guided attention and target-semantic prompting.

    image, image_pe: (1, C, h, w). tokens: (1, n, C). attention: (h, w), the similarity in [0, 1], None for SAM's own
    attention. target: (C,), not normalised, zeros for no prompting. Returns queries (1, n, C) and keys (1, h w, C).
    """
    keys, key_pe = image.flatten(2).transpose(1, 2), image_pe.flatten(2).transpose(1, 2)
    # The authors' code adds the target to the queries in place. Before the first block they are the very tensor that
    # is the tokens' positional term all along, so the target enters that term too and stays there.
    queries, query_pe = tokens, tokens + target
    for block in transformer.layers:
        queries = queries + target
        if block.skip_first_layer_pe:
            queries = block.norm1(block.self_attn(queries, queries, queries))
        else:
            q = queries + query_pe
            queries = block.norm1(queries + block.self_attn(q, q, queries))
        q, k = queries + query_pe, keys + key_pe
        queries = block.norm2(queries + guided_attention(block.cross_attn_token_to_image, q, k, keys, attention))
        queries = block.norm3(queries + block.mlp(queries))
        keys = block.norm4(keys + block.cross_attn_image_to_token(k, queries + query_pe, queries))
    attended = transformer.final_attn_token_to_image(queries + query_pe + target, keys + key_pe, keys)
    return transformer.norm_final_attn(queries + attended), keys


def guided_attention(layer: Attention, q: Tensor, k: Tensor, v: Tensor, attention: Tensor | None) -> Tensor:
    """Attention.forward with `attention` (h, w) added to each token's weights. q: (1, n, C). k, v: (1, h w, C)."""
    if attention is None:
        return layer(q, k, v)
    q, k, v = (project(x).unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
               for project, x in ((layer.q_proj, q), (layer.k_proj, k), (layer.v_proj, v)))
    weights = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)
    # The authors' code adds the similarity after the softmax and takes a second one. Of sums within [0, 2] that makes
    # a nearly even average over the image: no cell weighs more than e^2 = 7.4 times another.
    weights = (weights + attention.flatten()).softmax(3)
    return layer.out_proj((weights @ v).transpose(1, 2).flatten(2))
