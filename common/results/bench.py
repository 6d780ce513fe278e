"""How fast the parts are beside what they replace: a Markdown table, and the same figures as JSON.

    python -m common.results.bench [NAME=value ...]   NAME is any constant below; `help` lists them

There are five workloads. Each is done by this repository and by the published code that it
replaces, on the same inputs and weights. Each side first runs once without timing, and the two
results are compared. Then timed runs of both sides alternate.
"""

import common.runtime.first  # noqa: F401  before torch

import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import py_sod_metrics as sod
import torch
import torch.profiler
from PIL import Image
from segment_anything import SamPredictor
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
from common.frozen.sam_weights import ARCHITECTURES, load_sam
from common.metrics import evaluate_mask
from common.runtime import files, script, settings
from common.runtime.errors import UserError

# what is measured
WORKLOADS = ("all",)  # or some of embed, prompt, episode, cache, metrics
SAM = "vit_b"  # vit_b, vit_l, vit_h, mobile_sam: with random weights, as fast; a checkpoint; demo
IMAGES = 2  # embedded; a ViT-B takes up to 20 s each on two cores, a GPU wants 64
BATCH = 8  # of them at a time through our encoder, as in stage 1
PROMPTED = 4  # images prompted for 15 rounds; a GPU wants 64
EPISODE_IMAGES = 4  # in the PPO episode; for the paper's 50 the reference stores 3 GB of states
CACHED = 32  # entries read from a temporary cache: 2 MB of embedding each
MASKS = 1000  # about the size of a test set
REPEATS = 3  # timed runs of each side, of which the median counts
PROFILE = 0  # how many operators of our side are named below the table, the dearest first
SEED = 0  # of weights, pictures, points and masks
DEVICE = "auto"  # cuda, mps or cpu; auto takes the first there is
OUT = "runs/bench.json"  # the figures of the table, and every single run's time

# stage 1's and stage 3's, from the paper
_ROUNDS, _EPOCHS, _GAMMA, _CLIP_RANGE, _LEARNING_RATE = 15, 20, 0.99, 0.20, 1e-4
_FRAME, _PATCH = 800, 80
_PICTURE_SIZE, _MASK_SIZE = (480, 640), (300, 400)  # height and width of what people have
# those of common.metrics
_HANDLERS = {"IoU": sod.IOUHandler, "F": sod.FmeasureHandler, "BER": sod.BERHandler}

# Does the work once. Returns its result and the bytes that the roll-out keeps (0 without one).
Side = Callable[[], tuple[Tensor, int]]


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
    """SAM's image encoder, in batches and in bf16 where the hardware has it.

    The reference is SamPredictor.set_image, one by one.
    """
    random = np.random.default_rng(SEED)
    images = []
    for _ in range(IMAGES):
        picture = random.integers(0, 256, (*_PICTURE_SIZE, 3), np.uint8)
        images.append(squash(picture, sam.image_encoder.img_size, _FRAME))
    images = np.stack(images)
    embedder, predictor = SamEmbedder(sam), SamPredictor(sam)

    def ours() -> tuple[Tensor, int]:
        batches = [images[start:start + BATCH] for start in range(0, IMAGES, BATCH)]
        return torch.cat([embedder.embed(batch) for batch in batches]), 0

    def reference() -> tuple[Tensor, int]:
        embeddings = []
        for image in images:
            predictor.set_image(image)
            embeddings.append(predictor.features)
        return torch.cat(embeddings), 0

    precision = "bf16" if embedder.bf16 else "fp32"
    title = f"embed {IMAGES} images ({precision}; SamPredictor.set_image in fp32)"
    return Workload(title, ours, reference, least_cosine, 0.999)  # what the tests ask of bf16


def predict_one(predictor: SamPredictor, embedding: Tensor, points: Tensor,
                labels: Tensor) -> Tensor:
    """The published predictor's logits (1, 4h, 4w) of a cached image.

    embedding: (1, C, h, w). points: (n, 2) in the frame. labels: (n,).
    """
    side = predictor.model.image_encoder.img_size
    predictor.features, predictor.is_image_set = embedding, True
    predictor.original_size, predictor.input_size = (_FRAME, _FRAME), (side, side)
    points = predictor.transform.apply_coords_torch(points[None], predictor.original_size)
    return predictor.predict_torch(points, labels[None], multimask_output=False)[2][:, 0]


def random_prompts(sam: Sam, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (B, C, h, w), points (B, 2 + T, 2), labels (B, 2 + T), on SAM's device.

    The first two labels are 1 and 0. The encoder's last layer is a norm, so numbers of deviation 1
    are as good as an image's embedding.
    """
    generator = torch.Generator().manual_seed(SEED)
    encoder, shape = sam.prompt_encoder, (images, 2 + _ROUNDS)
    grid = encoder.image_embedding_size
    embeddings = torch.randn(images, encoder.embed_dim, *grid, generator=generator)
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
        logits = [prompter.decode(prepared, points[:, :n], labels[:, :n])[0] for n in rounds]
        return torch.stack(logits), 0

    def reference() -> tuple[Tensor, int]:
        logits = []
        for n in rounds:
            one_by_one = [predict_one(predictor, embeddings[i:i + 1], points[i, :n], labels[i, :n])
                          for i in range(PROMPTED)]
            logits.append(torch.cat(one_by_one))
        return torch.stack(logits), 0

    title = f"{_ROUNDS} rounds of prompting, {PROMPTED} images (SamPredictor.predict_torch)"
    # on a GPU the batch size decides which convolutions round to TF32
    return Workload(title, ours, reference, largest_difference, 1e-2)


class Play(NamedTuple):
    """An episode whose actions are chosen before, so that both sides take the same ones."""

    prompter: BatchedPrompter  # ours
    predictor: SamPredictor  # the reference
    embeddings: Tensor  # (B, C, h, w)
    points: Tensor  # (B, 2 + T, 2) in the frame, of which the first two are P_0
    labels: Tensor  # (B, 2 + T)
    centres: Tensor  # (A, 2)
    actions: Tensor  # (T, B)

    @property
    def answers(self) -> Tensor:
        """(T, B) labels of the actions."""
        return self.labels[:, 2:].T

    @property
    def rewards(self) -> Tensor:
        """(T, B)"""
        return self.answers * 2.0 - 1

    def networks(self) -> tuple[Actor, Critic, torch.optim.Optimizer]:
        """New ones, with the same weights every time."""
        torch.manual_seed(SEED)
        channels, device = self.embeddings.shape[1], self.embeddings.device
        actor = Actor(channels).to(device)
        critic = Critic(channels, 1 / (1 - _GAMMA)).to(device)
        weights = [*actor.parameters(), *critic.parameters()]
        return actor, critic, torch.optim.Adam(weights, _LEARNING_RATE)

    def learn(self, networks: tuple, calls: int, states: Callable[[], Tensor], allowed: Tensor,
              log_probs: Tensor, values: Tensor, last: Tensor) -> Tensor:
        """All epochs of PPO in that many calls, each on what `states` gives it.

        states: the pooled ones (T * B, C, g, g). allowed: (T, B, A). log_probs, values: (T, B).
        last: (B,), the value after the last round.
        Returns the trained policy in these states, (T * B, A).
        """
        targets = returns(self.rewards, last, _GAMMA)
        advantages = normalise(targets - values)
        # both sides build states themselves
        rollout = Rollout(None, allowed, self.actions, log_probs, values, self.answers,
                          self.rewards)
        for _ in range(calls):
            ppo_update(*networks, states(), rollout, targets, advantages, _EPOCHS // calls,
                       _CLIP_RANGE)
        actor = networks[0]
        with torch.no_grad():
            return policy(actor(states()), allowed.flatten(0, 1)).probs


def play_ours(play: Play) -> tuple[Tensor, int]:
    """As in 03_train_agent.py: images side by side, of which the roll-out keeps the masks."""
    actor, critic, _ = networks = play.networks()
    maps = play.embeddings[:, 0]  # there is no SRM, so nothing reads them
    run = Episode(play.prompter, play.embeddings, maps, play.centres)
    run.prompt(play.points[:, :2], play.labels[:, :2])
    masks, allowed, log_probs, values = [], [], [], []
    with torch.no_grad():
        for action, answer in zip(play.actions, play.answers):
            state = run.action_state()
            masks.append(run.mask)
            allowed.append(run.allowed)
            log_probs.append(policy(actor(state), run.allowed).log_prob(action))
            values.append(critic(state))
            run.step(action, answer)
        last = critic(run.action_state())

    def states() -> Tensor:
        side = _FRAME // _PATCH
        return torch.cat([pool_state(play.embeddings * mask[:, None], side) for mask in masks])

    learnt = play.learn(networks, 1, states, torch.stack(allowed), torch.stack(log_probs),
                        torch.stack(values), last)
    return learnt, sum(mask.nbytes for mask in masks)


def play_reference(play: Play) -> tuple[Tensor, int]:
    """Images one by one; the roll-out keeps the states at full size."""
    actor, critic, _ = networks = play.networks()
    side = _FRAME // _PATCH
    states = play.embeddings.new_empty(_ROUNDS, *play.embeddings.shape)
    allowed = torch.ones(*play.actions.shape, len(play.centres), dtype=torch.bool,
                         device=states.device)
    log_probs, values = torch.empty_like(play.rewards), torch.empty_like(play.rewards)
    last = torch.empty_like(play.rewards[0])
    with torch.no_grad():
        for i, labels in enumerate(play.labels):
            embedding, actions = play.embeddings[i:i + 1], play.actions[:, i]
            clicks = torch.cat([play.points[i, :2], play.centres[actions]])
            for t in range(_ROUNDS + 1):
                logits = predict_one(play.predictor, embedding, clicks[:2 + t], labels[:2 + t])
                state = embedding * probability_grid(logits, embedding.shape[2:])[:, None]
                pooled = pool_state(state, side)
                if t == _ROUNDS:
                    last[i] = critic(pooled)[0]
                    break
                states[t, i] = state[0]
                allowed[t, i, actions[:t]] = False
                choice = policy(actor(pooled), allowed[t, i:i + 1])
                log_probs[t, i] = choice.log_prob(actions[t:t + 1])[0]
                values[t, i] = critic(pooled)[0]
    learnt = play.learn(networks, _EPOCHS, lambda: pool_state(states.flatten(0, 1), side), allowed,
                        log_probs, values, last)
    return learnt, states.nbytes


def episode(sam: Sam, folder: Path) -> Workload:
    """A PPO episode without SRM: see `play_ours` and `play_reference`."""
    embeddings, points, labels = random_prompts(sam, EPISODE_IMAGES)
    centres = patch_centres(_FRAME, _PATCH).to(sam.device)
    generator = torch.Generator().manual_seed(SEED)
    actions = [torch.randperm(len(centres), generator=generator)[:_ROUNDS] for _ in embeddings]
    play = Play(BatchedPrompter(sam, _FRAME), SamPredictor(sam), embeddings, points, labels,
                centres, torch.stack(actions, 1).to(sam.device))
    title = f"a PPO episode of {EPISODE_IMAGES} images (states stored, images one by one)"
    # policies are compared, not weights: where a gradient is nearly 0, Adam moves a weight by its
    # learning rate at rounding's whim; each of the 100 actions starts with a probability of 1e-2
    return Workload(title, partial(play_ours, play), partial(play_reference, play),
                    largest_difference, 1e-5)


def cache(sam: Sam, folder: Path) -> Workload:
    """Embeddings from the cache against the same bytes from a plain file.

    The system holds both in memory.
    """
    shape = (sam.prompt_encoder.embed_dim, *sam.prompt_encoder.image_embedding_size)
    names = [str(number) for number in range(CACHED)]
    layout = Layout(names, ["test"] * CACHED, [_MASK_SIZE] * CACHED, [], ["target"], shape, _FRAME,
                    _PATCH)
    maps, label_map = torch.zeros(1, *shape[1:]), np.zeros(_MASK_SIZE, np.uint8)
    picture = np.zeros((PICTURE, PICTURE, 3), np.uint8)
    generator = torch.Generator().manual_seed(SEED)
    path, plain = folder / "features.h5", folder / "plain"
    with CacheWriter.open_or_create(path, layout, {}) as writer, plain.open("wb") as file:
        for number in range(CACHED):
            embedding = torch.randn(shape, generator=generator).half()
            writer.write(number, embedding, maps, label_map, picture)
            file.write(embedding.numpy().tobytes())
    opened = Cache.open(path)

    def ours() -> tuple[Tensor, int]:
        return opened.embedding(range(CACHED)), 0

    def reference() -> tuple[Tensor, int]:
        return torch.from_numpy(np.fromfile(plain, np.float16).reshape(CACHED, *shape)), 0

    size = plain.stat().st_size / 1e6
    title = f"read {CACHED} embeddings ({size:.3g} MB; the same bytes from a plain file)"
    return Workload(title, ours, reference, largest_difference, 0)


def random_masks() -> list[tuple[np.ndarray, np.ndarray]]:
    """Predictions bool (H, W) and truths uint8 (H, W), 0 or 1: small blobs and large ones."""
    random, pairs, size = np.random.default_rng(SEED), [], _MASK_SIZE[::-1]
    for _ in range(MASKS):
        noise = random.standard_normal((2, 6, 8)).astype(np.float32)
        blobs = np.asarray(Image.fromarray(noise[0]).resize(size, Image.BICUBIC))
        error = np.asarray(Image.fromarray(noise[1]).resize(size, Image.BICUBIC))
        # a quantile of the blobs themselves, so that no truth is empty
        truth = blobs > np.quantile(blobs[::8, ::8], random.uniform(0.3, 0.95))
        pairs.append((truth ^ (error > 1.2), truth.astype(np.uint8)))
    return pairs


def metrics(sam: Sam, folder: Path) -> Workload:
    """Metrics of blobs, in this one process.

    The reference is PySODMetrics as its users call it: step(), with all thresholds.
    """
    pairs, names = random_masks(), (*_HANDLERS, "E", "MAE")

    def ours() -> tuple[Tensor, int]:
        rows = []
        for prediction, truth in pairs:
            result = evaluate_mask(prediction, truth)
            rows.append([result[name] for name in names])
        return torch.tensor(rows, dtype=torch.float64), 0

    def reference() -> tuple[Tensor, int]:
        handlers = {name: handler(True, True, with_binary=True)
                    for name, handler in _HANDLERS.items()}
        counts, e_measure, error = sod.FmeasureV2(handlers), sod.Emeasure(), sod.MAE()
        for prediction, truth in pairs:
            # as pictures of 0 and 255, which takes under 1 % of its time
            pictures = prediction.view(np.uint8) * np.uint8(255), truth * np.uint8(255)
            for metric in (counts, e_measure, error):
                metric.step(*pictures)
        columns = [handler.binary_results for handler in handlers.values()]
        # 128: the mask's own threshold
        columns += [[curve[128] for curve in e_measure.changeable_ems], error.maes]
        return torch.from_numpy(np.array(columns, np.float64).T), 0

    height, width = _MASK_SIZE
    title = f"metrics of {MASKS} masks of {width} x {height} (PySODMetrics' step())"
    return Workload(title, ours, reference, largest_difference, 1e-9)


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
    """What a GPU can do here; None for other devices.

    Returns operations per second in bf16 matrix products, and bytes per second in copies.
    """
    if device.type != "cuda":
        return None
    side, size = 8192, 2**30  # large enough that starting the kernels does not count
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    b = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    source = torch.zeros(size, device=device, dtype=torch.uint8)
    target = torch.zeros(size, device=device, dtype=torch.uint8)

    def rate(work: Callable[[], object], amount: int) -> float:
        def ten_times() -> None:
            for _ in range(10):
                work()

        spent = [seconds(ten_times, device) for _ in range(1 + REPEATS)]
        return 10 * amount / median(spent[1:])  # the first warms up

    return rate(lambda: a @ b, 2 * side**3), rate(lambda: target.copy_(source), 2 * size)


class Traffic(TorchDispatchMode):
    """Counts the bytes of the tensors that operators read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for leaf in tree_leaves((args, kwargs, result)):
                if isinstance(leaf, Tensor):
                    # an expanded tensor is read no further than it is stored
                    self.bytes += min(leaf.nbytes, leaf.untyped_storage().nbytes())
        return result


@contextmanager
def in_one_thread() -> Iterator[None]:
    """Nothing is computed in other threads, where counters and profiler would not see it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def work_of(side: Callable[[], object]) -> tuple[int, int]:
    """What one call works: operations and bytes.

    Counts the floating-point operations of products and convolutions, and the bytes that all
    operators move.
    """
    with in_one_thread(), FlopCounterMode(display=False) as operations, Traffic() as traffic:
        side()
    return operations.get_total_flops(), traffic.bytes


def measure(workload: Workload, device: torch.device, ceiling: tuple[float, float] | None) -> dict:
    """Everything that the table and the file say of a workload."""
    (ours, kept), (reference, reference_kept) = workload.ours(), workload.reference()
    figure = workload.compare(ours, reference)
    if workload.compare is least_cosine:
        agrees = figure >= workload.limit
    else:
        agrees = figure <= workload.limit  # a NaN agrees with nothing
    del ours, reference  # on a GPU the timed runs need the room
    spent, reference_spent = [], []
    for _ in range(REPEATS):  # in turns, so that whatever else the machine does meets both
        spent.append(seconds(workload.ours, device))
        reference_spent.append(seconds(workload.reference, device))
    own_time, reference_time = median(spent), median(reference_spent)
    entry = {"title": workload.title, "seconds": own_time, "reference_seconds": reference_time,
             "ratio": reference_time / own_time, "runs": spent, "reference_runs": reference_spent,
             "comparison": workload.compare.__name__.replace("_", " "),
             "figure": figure if math.isfinite(figure) else None,  # JSON knows no NaN
             "limit": workload.limit, "agrees": agrees}
    if kept:
        entry |= {"kept_bytes": kept, "reference_kept_bytes": reference_kept}
    if ceiling:
        operations, moved = work_of(workload.ours)
        if operations:  # nothing of the cache and of the metrics runs on the GPU
            entry |= {"operations": operations, "compute_share": operations / own_time / ceiling[0],
                      "bytes_moved": moved, "memory_share": moved / own_time / ceiling[1]}
    return entry


def profile(side: Side, device: torch.device) -> list[tuple[str, float]]:
    """The PROFILE operators that take most of one call's time, each with its share of it.

    The time of an operator is its own, without that of operators it calls.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    spent = "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        spent = "self_device_time_total"
    with in_one_thread(), torch.profiler.profile(activities=activities) as recorded:
        side()
    times = {event.key: getattr(event, spent) for event in recorded.key_averages()}
    dearest = sorted(times, key=times.get, reverse=True)[:PROFILE]
    return [(name, times[name] / sum(times.values())) for name in dearest]


def row(entry: dict, ceiling: tuple[float, float] | None) -> str:
    """An entry as a line of the table."""
    def side(prefix: str) -> str:
        text = f"{entry[prefix + 'seconds']:.3g} s"
        if "kept_bytes" in entry:
            text += f", keeps {entry[prefix + 'kept_bytes'] / 1e6:.3g} MB"
        return text

    figure = "not finite" if entry["figure"] is None else f"{entry['figure']:.5g}"
    beyond = "" if entry["agrees"] else f", **beyond {entry['limit']:g}**"
    cells = [entry["title"], side(""), side("reference_"), f"{entry['ratio']:.2f}",
             f"{entry['comparison']} {figure}{beyond}"]
    if ceiling and "operations" in entry:
        cells.append(f"{100 * entry['compute_share']:.1f} % of compute, "
                     f"{100 * entry['memory_share']:.1f} % of memory")
    elif ceiling:
        cells.append("")
    return f"| {' | '.join(cells)} |"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")  # Linux; elsewhere, and on some of its processors, less is told
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name} (mps)" if device.type == "mps" else name


def build_sam(device: torch.device) -> Sam:
    """The frozen SAM: an official architecture with random weights, or what else SAM names."""
    if SAM not in ARCHITECTURES:
        return load_sam(SAM, device)
    script.seed_everything(SEED)
    sam = ARCHITECTURES[SAM]()
    with torch.no_grad():
        for weight in sam.parameters():  # what starts at 0 or 1 would hide a difference
            weight.add_(torch.randn_like(weight), alpha=0.02)
    return sam.eval().requires_grad_(False).to(device)


def chosen_workloads() -> list[str]:
    """WORKLOADS without repetition. Raises UserError where a constant makes no sense."""
    settings.positive(globals(), "IMAGES", "BATCH", "PROMPTED", "EPISODE_IMAGES", "CACHED", "MASKS",
                      "REPEATS")
    settings.not_negative(globals(), "SEED", "PROFILE")
    if EPISODE_IMAGES < 2:
        raise UserError("EPISODE_IMAGES=1 is too few: advantages compare images, so set 2 or more")
    return settings.choose("WORKLOADS", WORKLOADS, _BUILDERS)


def main() -> None:
    chosen = chosen_workloads()
    files.require_ours(Path(OUT))
    device = script.device(DEVICE)
    sam, ceiling = build_sam(device), ceilings(device)
    report = {"device": device_name(device), "torch": torch.__version__,
              "threads": torch.get_num_threads(), "sam": SAM, "seed": SEED, "repeats": REPEATS,
              "workloads": {}}
    print(f"{report['device']}, torch {report['torch']}, {report['threads']} threads, SAM {SAM}; "
          f"medians of {REPEATS}; in brackets: the reference; ratio: its time over ours")
    heads = ["workload", "ours", "reference", "ratio", "results compared"]
    if ceiling:
        operations, moved = ceiling
        report |= {"ceiling_operations_per_second": operations, "ceiling_bytes_per_second": moved}
        print(f"ceilings: bf16 matrix products {operations / 1e12:.0f} TFLOP/s, "
              f"copies {moved / 1e12:.2f} TB/s")
        heads.append("share of the ceilings")
    print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            workload = _BUILDERS[name](sam, Path(folder))
            report["workloads"][name] = entry = measure(workload, device, ceiling)
            print(row(entry, ceiling), flush=True)
            if PROFILE:
                entry["profile"] = profile(workload.ours, device)
    for name, entry in report["workloads"].items():
        if PROFILE:
            shares = [f"{operator} {100 * share:.0f} %" for operator, share in entry["profile"]]
            print(f"\n{name}: {', '.join(shares)}")
    text = json.dumps(report, indent=1)
    files.write_text(Path(OUT), text)
    print(f"\nwrote {OUT}")
    apart = [name for name, entry in report["workloads"].items() if not entry["agrees"]]
    if apart:
        raise UserError(f"the two sides of {', '.join(apart)} differ beyond the limit, so their "
                        "times do not compare: check the weights that SAM names, and run the tests")


if __name__ == "__main__":
    script.run(main, globals())
