"""How fast the parts are beside what they replace: one Markdown table, and the same figures as JSON.

    python -m common.results.bench [NAME=value ...]             NAME is any constant below; `help` lists them

Five workloads, each done by this repository and by the published code it stands in for, on the same inputs and the same
weights. Both sides run once unmeasured, which warms them up and whose results are compared; then they take turns.
"""

import json
import math
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import py_sod_metrics as sod
import torch
import torch.profiler
from PIL import Image
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from common.agent import Actor, Critic, Rollout, normalise, policy, pool_state, ppo_update, returns
from common.cache import Cache
from common.cache_file import PICTURE, CacheWriter, Layout
from common.episode import Episode, patch_centres
from common.frozen.sam import BatchedPrompter, SamEmbedder, probability_grid, squash
from common.frozen.sam_weights import CHECKPOINTS, load_sam
from common.metrics import evaluate_mask
from common.runtime import files, script, settings
from common.runtime.errors import UserError

# what is measured; the defaults take about five minutes on two CPU cores
WORKLOADS = ("all",)  # or some of embed, prompt, episode, cache, metrics
SAM = "vit_b"  # vit_b, vit_l or vit_h under seeded random weights (speed does not depend on them); a checkpoint; demo
IMAGES = 2  # embedded; a ViT-B takes up to 20 s each on two cores, a GPU wants 64
BATCH = 8  # of them at a time through our encoder, as in stage 1
PROMPTED = 4  # images prompted for 15 rounds; a GPU wants 64
EPISODE_IMAGES = 4  # in the PPO episode: the paper has 50, for which the reference stores 3 GB of states
CACHED = 32  # entries read from a temporary cache: 2 MB of embedding each
MASKS = 1000  # about the size of a test set
REPEATS = 3  # timed runs of each side, of which the median counts
PROFILE = 0  # operators of our side that are named below the table, the dearest first; 0 = no profile
SEED = 0  # of weights, pictures, points and masks
DEVICE = "auto"  # cuda, mps or cpu; auto takes the first there is
OUT = "runs/bench.json"  # the figures of the table, and every single run's time

# stage 1's and stage 3's, from the paper
_ROUNDS, _EPOCHS, _GAMMA, _CLIP_RANGE, _LEARNING_RATE = 15, 20, 0.99, 0.20, 1e-4
_FRAME, _PATCH = 800, 80
_PICTURE_SIZE, _MASK_SIZE = (480, 640), (300, 400)  # height and width of what people have
_HANDLERS = {"IoU": sod.IOUHandler, "F": sod.FmeasureHandler, "BER": sod.BERHandler}  # those of common.metrics

Side = Callable[[], tuple[Tensor, int]]  # does the work once: its result, and the bytes that a roll-out keeps, else 0


@dataclass
class Workload:
    """One line of the table: two ways to the same result."""

    title: str
    ours: Side
    reference: Side
    compare: Callable[[Tensor, Tensor], float]
    limit: float  # of the comparison: times of different results do not compare


def least_cosine(ours: Tensor, reference: Tensor) -> float:
    return torch.cosine_similarity(ours.flatten(1), reference.flatten(1)).min().item()


def largest_difference(ours: Tensor, reference: Tensor) -> float:
    return (ours - reference).abs().max().item()


def embed(sam: Sam, folder: Path) -> Workload:
    """SAM's image encoder: in batches, in bf16 where the hardware has it, against SamPredictor.set_image one by one."""
    random = np.random.default_rng(SEED)
    pictures = (random.integers(0, 256, (*_PICTURE_SIZE, 3), np.uint8) for _ in range(IMAGES))
    images = np.stack([squash(picture, sam.image_encoder.img_size, _FRAME) for picture in pictures])
    embedder, predictor = SamEmbedder(sam), SamPredictor(sam)

    def ours() -> tuple[Tensor, int]:
        return torch.cat([embedder.embed(images[i:i + BATCH]) for i in range(0, IMAGES, BATCH)]), 0

    def reference() -> tuple[Tensor, int]:
        features = []
        for image in images:
            predictor.set_image(image)
            features.append(predictor.features)
        return torch.cat(features), 0

    precision = "bf16" if embedder.bf16 else "fp32"
    return Workload(f"embed {IMAGES} images ({precision}; SamPredictor.set_image in fp32)", ours, reference,
                    least_cosine, 0.999)  # what the tests ask of bf16


def predict_one(predictor: SamPredictor, embedding: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """The published predictor's logits (1, 4h, 4w) of a cached image (1, C, h, w) and points (n, 2) in the frame."""
    predictor.features, predictor.is_image_set = embedding, True
    predictor.original_size, predictor.input_size = (_FRAME, _FRAME), (predictor.model.image_encoder.img_size,) * 2
    points = predictor.transform.apply_coords_torch(points[None], predictor.original_size)
    return predictor.predict_torch(points, labels[None], multimask_output=False)[2][:, 0]


def random_prompts(sam: Sam, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (B, C, h, w), points (B, 2 + rounds, 2) and labels, the first two of them 1 and 0, on SAM's device.

    The encoder's last layer is a norm, so numbers of deviation 1 are as good as an image's embedding.
    """
    generator = torch.Generator().manual_seed(SEED)
    encoder, shape = sam.prompt_encoder, (images, 2 + _ROUNDS)
    embeddings = torch.randn(images, encoder.embed_dim, *encoder.image_embedding_size, generator=generator)
    points = _FRAME * torch.rand(*shape, 2, generator=generator)
    labels = torch.randint(2, shape, generator=generator)
    labels[:, 0], labels[:, 1] = 1, 0
    return embeddings.to(sam.device), points.to(sam.device), labels.to(sam.device)


def prompt(sam: Sam, folder: Path) -> Workload:
    """Rounds of prompting from cached embeddings: images side by side against one at a time."""
    embeddings, points, labels = random_prompts(sam, PROMPTED)
    prompter, predictor = BatchedPrompter(sam, _FRAME), SamPredictor(sam)
    rounds = range(3, 3 + _ROUNDS)  # points after each

    def ours() -> tuple[Tensor, int]:
        prepared = prompter.prepare(embeddings)
        return torch.stack([prompter.decode(prepared, points[:, :n], labels[:, :n])[0] for n in rounds]), 0

    def reference() -> tuple[Tensor, int]:
        return torch.stack([torch.cat([predict_one(predictor, embeddings[i:i + 1], points[i, :n], labels[i, :n])
                                       for i in range(PROMPTED)]) for n in rounds]), 0

    return Workload(f"{_ROUNDS} rounds of prompting, {PROMPTED} images (SamPredictor.predict_torch)", ours, reference,
                    largest_difference, 1e-2)  # on a GPU the batch size decides which convolutions round to TF32


def episode(sam: Sam, folder: Path) -> Workload:
    """A PPO episode without SRM: images side by side, masks kept, against images one by one, full-size states kept."""
    embeddings, points, labels = random_prompts(sam, EPISODE_IMAGES)
    centres, side = patch_centres(_FRAME, _PATCH).to(sam.device), _FRAME // _PATCH
    generator = torch.Generator().manual_seed(SEED)
    actions = torch.stack([torch.randperm(len(centres), generator=generator)[:_ROUNDS] for _ in embeddings], 1)
    actions, answers = actions.to(sam.device), labels[:, 2:].T  # (rounds, B); both sides take the same actions
    rewards = answers * 2.0 - 1
    prompter, predictor = BatchedPrompter(sam, _FRAME), SamPredictor(sam)

    def networks() -> tuple[Actor, Critic, torch.optim.Optimizer]:
        torch.manual_seed(SEED)
        channels = embeddings.shape[1]
        actor, critic = Actor(channels).to(sam.device), Critic(channels, 1 / (1 - _GAMMA)).to(sam.device)
        return actor, critic, torch.optim.Adam([*actor.parameters(), *critic.parameters()], _LEARNING_RATE)

    def learn(nets: tuple, calls: int, states: Callable[[], Tensor], allowed: Tensor, log_probs: Tensor, values: Tensor,
              last: Tensor) -> Tensor:
        """All epochs in that many calls, each on what `states` gives it; returns the trained policy in these states."""
        targets = returns(rewards, last, _GAMMA)
        advantages = normalise(targets - values)
        rollout = Rollout(None, allowed, actions, log_probs, values, answers, rewards)  # both build states themselves
        for _ in range(calls):
            ppo_update(*nets, states(), rollout, targets, advantages, _EPOCHS // calls, _CLIP_RANGE)
        with torch.no_grad():
            return policy(nets[0](states()), allowed.flatten(0, 1)).probs

    def ours() -> tuple[Tensor, int]:  # as in 03_train_agent.py
        actor, critic, _ = nets = networks()
        run = Episode(prompter, embeddings, embeddings[:, 0], centres)  # no SRM, so nothing reads the maps
        run.prompt(points[:, :2], labels[:, :2])
        masks, allowed, log_probs, values = [], [], [], []
        with torch.no_grad():
            for action, answer in zip(actions, answers):
                state = run.action_state()
                masks.append(run.mask)
                allowed.append(run.allowed)
                log_probs.append(policy(actor(state), run.allowed).log_prob(action))
                values.append(critic(state))
                run.step(action, answer)
            last = critic(run.action_state())
        learnt = learn(nets, 1, lambda: torch.cat([pool_state(embeddings * mask[:, None], side) for mask in masks]),
                       torch.stack(allowed), torch.stack(log_probs), torch.stack(values), last)
        return learnt, sum(mask.nbytes for mask in masks)

    def reference() -> tuple[Tensor, int]:
        actor, critic, _ = nets = networks()
        states = embeddings.new_empty(_ROUNDS, *embeddings.shape)
        allowed = torch.ones(*actions.shape, len(centres), dtype=torch.bool, device=sam.device)
        log_probs, values, last = (torch.empty_like(like) for like in (rewards, rewards, rewards[0]))
        with torch.no_grad():
            for i in range(EPISODE_IMAGES):
                clicks = torch.cat([points[i, :2], centres[actions[:, i]]])
                for t in range(_ROUNDS + 1):
                    logits = predict_one(predictor, embeddings[i:i + 1], clicks[:2 + t], labels[i, :2 + t])
                    state = embeddings[i:i + 1] * probability_grid(logits, embeddings.shape[2:])[:, None]
                    pooled = pool_state(state, side)
                    if t == _ROUNDS:
                        last[i] = critic(pooled)[0]
                        break
                    states[t, i] = state[0]
                    allowed[t, i, actions[:t, i]] = False
                    log_probs[t, i] = policy(actor(pooled), allowed[t, i:i + 1]).log_prob(actions[t, i:i + 1])[0]
                    values[t, i] = critic(pooled)[0]
        learnt = learn(nets, _EPOCHS, lambda: pool_state(states.flatten(0, 1), side), allowed,
                       log_probs, values, last)
        return learnt, states.nbytes

    # not the weights: where a gradient is nearly 0, Adam moves a weight by its learning rate at rounding's whim
    return Workload(f"a PPO episode of {EPISODE_IMAGES} images (states stored, images one by one)", ours, reference,
                    largest_difference, 1e-5)  # each of the 100 actions starts with a probability of 1e-2


def cache(sam: Sam, folder: Path) -> Workload:
    """Embeddings from the cache against the same bytes from a plain file; the system holds both in memory."""
    shape = (sam.prompt_encoder.embed_dim, *sam.prompt_encoder.image_embedding_size)
    names = [str(number) for number in range(CACHED)]
    layout = Layout(names, ["test"] * CACHED, [_MASK_SIZE] * CACHED, [], ["target"], shape, _FRAME, _PATCH)
    generator, plain = torch.Generator().manual_seed(SEED), folder / "plain"
    with CacheWriter.open_or_create(folder / "features.h5", layout, {}) as writer, plain.open("wb") as file:
        for number in range(CACHED):
            embedding = torch.randn(shape, generator=generator).half()
            writer.write(number, embedding, torch.zeros(1, *shape[1:]), np.zeros(_MASK_SIZE, np.uint8),
                         np.zeros((PICTURE, PICTURE, 3), np.uint8))
            file.write(embedding.numpy().tobytes())
    features = Cache.open(folder / "features.h5")

    def ours() -> tuple[Tensor, int]:
        return features.embedding(range(CACHED)), 0

    def reference() -> tuple[Tensor, int]:
        return torch.from_numpy(np.fromfile(plain, np.float16).reshape(CACHED, *shape)), 0

    return Workload(f"read {CACHED} embeddings ({plain.stat().st_size / 1e6:.3g} MB; the same bytes from a plain file)",
                    ours, reference, largest_difference, 0)


def metrics(sam: Sam, folder: Path) -> Workload:
    """Metrics of blobs, in this one process, against PySODMetrics as its users call it: step(), with all thresholds."""
    random, pairs = np.random.default_rng(SEED), []
    for _ in range(MASKS):
        noise = random.standard_normal((2, 6, 8)).astype(np.float32)
        blobs, error = (np.asarray(Image.fromarray(part).resize(_MASK_SIZE[::-1], Image.BICUBIC)) for part in noise)
        truth = blobs > np.quantile(blobs[::8, ::8], random.uniform(0.3, 0.95))  # small ones and large ones, none empty
        pairs.append((truth ^ (error > 1.2), truth.astype(np.uint8)))
    names = (*_HANDLERS, "E", "MAE")

    def ours() -> tuple[Tensor, int]:
        results = [evaluate_mask(prediction, truth) for prediction, truth in pairs]
        return torch.tensor([[result[name] for name in names] for result in results], dtype=torch.float64), 0

    def reference() -> tuple[Tensor, int]:
        handlers = {name: handler(True, True, with_binary=True) for name, handler in _HANDLERS.items()}
        counts, e_measure, error = sod.FmeasureV2(handlers), sod.Emeasure(), sod.MAE()
        for prediction, truth in pairs:
            pictures = prediction.view(np.uint8) * np.uint8(255), truth * np.uint8(255)  # under 1 % of its time
            for metric in (counts, e_measure, error):
                metric.step(*pictures)
        columns = [handler.binary_results for handler in handlers.values()]
        columns += [[curve[128] for curve in e_measure.changeable_ems], error.maes]  # 128: the mask's own threshold
        return torch.from_numpy(np.array(columns, np.float64).T), 0

    return Workload(f"metrics of {MASKS} masks of {_MASK_SIZE[1]} x {_MASK_SIZE[0]} (PySODMetrics' step())", ours,
                    reference, largest_difference, 1e-9)


_BUILDERS = {build.__name__: build for build in (embed, prompt, episode, cache, metrics)}


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, with what it left running on the device."""
    waits = {"cuda": lambda: torch.cuda.synchronize(device), "mps": torch.mps.synchronize}
    wait = waits.get(device.type, lambda: None)
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def ceilings(device: torch.device) -> tuple[float, float] | None:
    """What a GPU can do here: operations per second in bf16 matrix products, bytes per second in copies; else None."""
    if device.type != "cuda":
        return None
    side, size = 8192, 2**30  # large enough that starting the kernels does not count
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.zeros(size, device=device, dtype=torch.uint8) for _ in range(2))

    def rate(work: Callable[[], object], amount: int) -> float:
        spent = [seconds(lambda: [work() for _ in range(10)], device) for _ in range(1 + REPEATS)]
        return 10 * amount / median(spent[1:])  # the first warms up

    return rate(lambda: a @ b, 2 * side**3), rate(lambda: target.copy_(source), 2 * size)


class Traffic(TorchDispatchMode):
    """Counts the bytes of the tensors that operators read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read, written = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
                         for tree in ((args, kwargs), result))
        if not func.is_view:
            # an expanded tensor is read no further than it is stored
            self.bytes += sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in read + written)
        return result


def work_of(side: Callable[[], object]) -> tuple[int, int]:
    """Floating-point operations of the products and convolutions in one call, and bytes that all its operators move."""
    with FlopCounterMode(display=False) as operations, Traffic() as traffic:
        side()
    return operations.get_total_flops(), traffic.bytes


def measure(workload: Workload, device: torch.device, ceiling: tuple[float, float] | None) -> dict:
    """Everything that the table and the file say of a workload."""
    (ours, kept), (reference, reference_kept) = workload.ours(), workload.reference()
    figure = workload.compare(ours, reference)
    # a NaN agrees with nothing
    agrees = figure >= workload.limit if workload.compare is least_cosine else figure <= workload.limit
    del ours, reference  # on a GPU the timed runs need the room
    # in turns, so that whatever else the machine does meets both
    runs = [(seconds(workload.ours, device), seconds(workload.reference, device)) for _ in range(REPEATS)]
    spent, reference_spent = map(list, zip(*runs))
    entry = {"title": workload.title, "seconds": median(spent), "reference_seconds": median(reference_spent),
             "ratio": median(reference_spent) / median(spent), "runs": spent, "reference_runs": reference_spent,
             "comparison": workload.compare.__name__.replace("_", " "),
             "figure": figure if math.isfinite(figure) else None,  # JSON knows no NaN
             "limit": workload.limit, "agrees": agrees}
    if kept:
        entry |= {"kept_bytes": kept, "reference_kept_bytes": reference_kept}
    if ceiling:
        operations, moved = work_of(workload.ours)
        if operations:  # nothing of the cache and of the metrics runs on the GPU
            entry |= {"operations": operations, "compute_share": operations / median(spent) / ceiling[0],
                      "bytes_moved": moved, "memory_share": moved / median(spent) / ceiling[1]}
    return entry


def profile(side: Side, device: torch.device) -> list[tuple[str, float]]:
    """The PROFILE operators that take the most time of one call themselves, each with its share of all of them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    spent = "self_cpu_time_total"
    if device.type == "cuda":
        activities, spent = [*activities, torch.profiler.ProfilerActivity.CUDA], "self_device_time_total"
    with torch.profiler.profile(activities=activities) as recorded:
        side()
    times = {event.key: getattr(event, spent) for event in recorded.key_averages()}
    dearest = sorted(times, key=times.get, reverse=True)[:PROFILE]
    return [(name, times[name] / sum(times.values())) for name in dearest]


def row(entry: dict, ceiling: tuple[float, float] | None) -> str:
    """An entry as a line of the table."""
    def side(prefix: str) -> str:
        kept = f", keeps {entry[prefix + 'kept_bytes'] / 1e6:.3g} MB" if "kept_bytes" in entry else ""
        return f"{entry[prefix + 'seconds']:.3g} s{kept}"

    figure = "not finite" if entry["figure"] is None else f"{entry['figure']:.5g}"
    beyond = "" if entry["agrees"] else f", **beyond {entry['limit']:g}**"
    cells = [entry["title"], side(""), side("reference_"), f"{entry['ratio']:.2f}",
             f"{entry['comparison']} {figure}{beyond}"]
    if ceiling:
        cells.append(f"{100 * entry['compute_share']:.1f} % of compute, {100 * entry['memory_share']:.1f} % of memory"
                     if "operations" in entry else "")
    return f"| {' | '.join(cells)} |"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")  # Linux; elsewhere, and on some of its processors, less is told
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (models or [platform.processor() or platform.machine()])[0] + " (mps)" * (device.type == "mps")


def build_sam(device: torch.device) -> Sam:
    """The frozen SAM: an official architecture under seeded random weights, or whatever else SAM names."""
    if SAM not in CHECKPOINTS:
        return load_sam(SAM, device)
    script.seed_everything(SEED)
    sam = sam_model_registry[SAM]()
    with torch.no_grad():
        for weight in sam.parameters():  # what starts at 0 or 1 would hide a difference
            weight.add_(torch.randn_like(weight), alpha=0.02)
    return sam.eval().requires_grad_(False).to(device)


def main() -> None:
    settings.positive(globals(), "IMAGES", "BATCH", "PROMPTED", "EPISODE_IMAGES", "CACHED", "MASKS", "REPEATS")
    settings.not_negative(globals(), "SEED", "PROFILE")
    if EPISODE_IMAGES < 2:
        raise UserError("EPISODE_IMAGES=1 is too few to compare an action with another: set 2 or more")
    if unknown := [name for name in WORKLOADS if name not in ("all", *_BUILDERS)]:
        raise UserError(f"WORKLOADS names {unknown[0]!r}: choose among {', '.join(_BUILDERS)}, or all")
    chosen = list(_BUILDERS if "all" in WORKLOADS else dict.fromkeys(WORKLOADS))
    device = script.device(DEVICE)
    sam, ceiling = build_sam(device), ceilings(device)
    report = {"device": device_name(device), "torch": torch.__version__, "threads": torch.get_num_threads(), "sam": SAM,
              "seed": SEED, "repeats": REPEATS, "workloads": {}}
    print(f"{report['device']}, torch {report['torch']}, {report['threads']} threads, SAM {SAM}; medians of {REPEATS}; "
          "in brackets: the reference; ratio: its time over ours")
    heads = ["workload", "ours", "reference", "ratio", "results compared"]
    if ceiling:
        report |= {"ceiling_operations_per_second": ceiling[0], "ceiling_bytes_per_second": ceiling[1]}
        print(f"ceilings: bf16 matrix products {ceiling[0] / 1e12:.0f} TFLOP/s, copies {ceiling[1] / 1e12:.2f} TB/s")
        heads.append("share of the ceilings")
    print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            workload = _BUILDERS[name](sam, Path(folder))
            report["workloads"][name] = entry = measure(workload, device, ceiling)
            print(row(entry, ceiling), flush=True)
            if PROFILE:
                entry["profile"] = profile(workload.ours, device)
    for name in chosen if PROFILE else ():
        print(f"\n{name}: " + ", ".join(f"{operator} {100 * share:.0f} %"
                                        for operator, share in report["workloads"][name]["profile"]))
    files.write_atomic(Path(OUT), lambda temporary: temporary.write_text(json.dumps(report, indent=1)))
    print(f"\nwrote {OUT}")
    if apart := [name for name in chosen if not report["workloads"][name]["agrees"]]:
        raise UserError(f"the two sides of {', '.join(apart)} differ beyond the limit, so their times do not "
                                 "compare: check the weights that SAM names, and run the tests")


if __name__ == "__main__":
    script.run(main, globals())
