"""Stage 3: trains the PPO agent from the cache with live SAM decoder calls (paper, Algorithm 1).

    python 03_train_agent.py [NAME=value ...]     NAME is any constant below; `help` lists them

An episode is T rounds on all samples side by side, where the SRM learns too, then K epochs of PPO.
"""

import common.runtime.first  # noqa: F401  before torch

import time
from statistics import fmean

import torch

from common.agent import (
    LOGIT_SCALE,
    Actor,
    Critic,
    Learner,
    Rollout,
    normalise,
    pick,
    policy,
    ppo_update,
    returns,
)
from common.cache import TrainingSet
from common.episode import Episode, random_pixels
from common.label_maps import IGNORE
from common.metrics import grid_iou
from common.results.pictures import plot_curves
from common.runtime import checkpoint, files, script, settings
from common.runtime.errors import UserError
from common.runtime.progress import progress
from common.runtime.run import open_run
from common.srm import CHANNEL_DROP, HEADS, build_srm, train_step

# what is trained
TASK = "demo_saliency"  # as in stage 1
SEED = 0  # of weights, points and actions
SHOTS = 0  # as in stage 2

# PPO (paper, section 4)
EPISODES = 50  # E: roll-outs of all training samples
EPOCHS = 20  # K: full-batch updates after each roll-out
ROUNDS = 15  # T: points chosen in an episode
GAMMA = 0.99  # discount
CLIP_RANGE = 0.20  # epsilon
LEARNING_RATE = 1e-4  # Adam, of actor, critic and SRM

# the SRM's share (section 3.3)
SRM_STEPS = {"implicit": 1, "explicit": 5}  # q: optimiser steps before P_0 and after each a_t
SRM_BATCH = 8  # samples of the roll-out in one such step; all of them cost over an hour on a CPU

# where it goes
RUN_DIR = ""  # empty = runs/<TASK>
FEATURES = ""  # stage 1's cache; empty = features.h5 in the run folder
SAM = ""  # the cache's SAM, where its file lies elsewhere now; empty = where stage 1 found it
DEVICE = "auto"  # cuda, mps or cpu; auto takes the first there is

_OF_STAGE_2 = ("steps", "srm_batch", "learning_rate", "rounds", "states", "channel_drop",
               "join_kernel")  # its settings that agent.pt repeats


def train_srm(learner: Learner, episode: Episode, shots: TrainingSet, made_with: dict,
              generator: torch.Generator) -> tuple[float, float]:
    """q steps of Eq. 13 in the states that the samples are in now; what the last step returned."""
    for _ in range(made_with["srm_steps"]):
        rows = torch.randperm(len(shots.samples), generator=generator)[:SRM_BATCH]
        rows = rows.to(shots.truth.device)
        maps, y = shots.maps_and_truth(rows, made_with["every_text"], generator)
        s_c, s_t = episode.semantic_state(rows, maps), episode.state(rows)
        last = train_step(learner.srm, learner.srm_optimizer, s_c, s_t, y, generator)
    return last


def roll_out(learner: Learner, episode: Episode, shots: TrainingSet, made_with: dict,
             generator: torch.Generator) -> tuple[Rollout, list[tuple[float, float]]]:
    """Algorithm 1 from P_0 to M_T, for all samples. Also returns what each `train_srm` returned."""
    # P_0 is a random pixel of foreground and one of background, M_0 = D_M(F, P_0)
    srm_log = [train_srm(learner, episode, shots, made_with, generator)]  # the state without a mask
    episode.start_from_truth(random_pixels(shots.label_maps, generator, episode.frame))
    rounds = []
    for _ in range(ROUNDS):
        with torch.no_grad():
            state = episode.action_state()  # s_t = F * M_{t-1}
            distribution = policy(learner.actor(state), episode.allowed)
            action = pick(distribution, generator)  # a_t ~ pi(. | s_t)
            label = episode.label_by(episode.foreground(learner.srm), action)  # y_r at a_t
            value = learner.critic(state)  # V(s_t)
        on_foreground = shots.truth_centres.gather(1, action[:, None])[:, 0] == 1
        reward = on_foreground.float() * 2 - 1  # r_t: +1 on foreground, else -1
        rounds.append((episode.mask, episode.allowed, action, distribution.log_prob(action), value,
                       label, reward))
        # the SRM learns in s_t, where it has just answered
        srm_log.append(train_srm(learner, episode, shots, made_with, generator))
        episode.step(action, label)  # P_t: P_{t-1} and a_t with its label; M_t = D_M(F, P_t)
    return Rollout(*(torch.stack(part) for part in zip(*rounds))), srm_log


def main() -> None:
    settings.positive(globals(), "EPISODES", "EPOCHS", "ROUNDS", "CLIP_RANGE", "LEARNING_RATE",
                      "SRM_STEPS", "SRM_BATCH")
    settings.not_negative(globals(), "SEED", "SHOTS")
    if not 0 < GAMMA < 1:
        raise UserError(f"GAMMA={GAMMA} is no discount: set it above 0 and below 1")
    run = open_run(globals())
    shots, identity = run.cache.training_set(SHOTS, ROUNDS, run.device), run.cache.identity()

    # stage 2's SRM goes on learning here; srm.pt itself stays as it is
    srm_path = run.folder / "srm.pt"
    stage_2 = script.command("02_train_srm.py", globals(), ("SHOTS", "SEED", "SAM"))
    wanted = {"task": TASK, "shots": SHOTS, "heads": HEADS, "features": identity}
    start = checkpoint.load_finished(srm_path, stage_2, wanted, _OF_STAGE_2)
    branch, residual = start["settings"]["branch"], start["settings"]["residual"]
    files.lock(run.folder)
    prompter = run.load_prompter()

    # the networks, fresh or from where a killed run stopped
    script.seed_everything(SEED)
    generator = torch.Generator().manual_seed(SEED)
    srm = build_srm(branch, run.cache.channels).to(run.device)
    checkpoint.restore(srm_path, start, srm=srm)
    actor = Actor(run.cache.channels).to(run.device)
    critic = Critic(run.cache.channels, scale=1 / (1 - GAMMA)).to(run.device)  # a return's bound
    ppo = torch.optim.Adam([*actor.parameters(), *critic.parameters()], LEARNING_RATE)
    learner = Learner(srm, actor, critic, ppo, torch.optim.Adam(srm.parameters(), LEARNING_RATE))
    made_with = {
        "task": TASK, "branch": branch, "seed": SEED, "shots": SHOTS, "episodes": EPISODES,
        "epochs": EPOCHS, "rounds": ROUNDS, "gamma": GAMMA, "clip_range": CLIP_RANGE,
        "learning_rate": LEARNING_RATE, "every_text": start["settings"]["every_text"],
        "residual": residual, "srm_steps": SRM_STEPS[branch], "srm_batch": SRM_BATCH,
        "channel_drop": CHANNEL_DROP, "heads": HEADS, "logit_scale": LOGIT_SCALE,
        "features": identity, "srm": checkpoint.fingerprint(start["srm"]),
        "stage_2": {name: start["settings"][name] for name in _OF_STAGE_2}}
    log_path, curves = run.folder / "agent_log.csv", run.folder / "agent_curves.png"
    files.require_ours(log_path, curves)
    path, this_stage = run.folder / "agent.pt", script.command("03_train_agent.py", globals())
    saved = checkpoint.resume(path, this_stage, made_with, {}, **learner._asdict(),
                              generator=generator)
    log = saved["log"] if saved else []

    numbers = range(len(log) + 1, EPISODES + 1)
    for number in progress(numbers, "training the agent", EPISODES, len(log)):
        started = time.time()
        allowed = shots.truth_centres != IGNORE  # patches on ignored pixels are never chosen
        episode = Episode(prompter, shots.embeddings, shots.maps, run.centres, allowed, residual)
        rollout, srm_log = roll_out(learner, episode, shots, made_with, generator)

        # Eqs. 6 and 7: returns that end in V(s_{T+1}), s_{T+1} = F * M_T, and advantages
        last_value = critic(episode.action_state()).detach()
        targets = returns(rollout.rewards, last_value, GAMMA)
        advantages = normalise(targets - rollout.values)

        # Eqs. 8 to 10: K epochs of PPO on the states of the roll-out, s_t = F * M_{t-1}
        states = torch.cat([episode.action_state(mask) for mask in rollout.masks])
        update = ppo_update(actor, critic, ppo, states, rollout, targets, advantages,
                            epochs=EPOCHS, clip_range=CLIP_RANGE)

        srm_losses, srm_accuracies = zip(*srm_log)
        log.append({"episode": number, **rollout.summary(), **update,
                    "srm_loss": fmean(srm_losses), "srm_accuracy": fmean(srm_accuracies),
                    "training_iou": grid_iou(episode.mask, shots.truth),
                    "seconds": time.time() - started})
        losses = {name: log[-1][name] for name in ("policy_loss", "value_loss", "srm_loss")}
        script.require_finite(losses, f"in episode {number}")
        checkpoint.save_training(path, made_with, log, finished=number == EPISODES,
                                 generator=generator, **learner._asdict())
        checkpoint.write_log(log_path, log)

    checkpoint.write_log(log_path, log)  # also where a kill came between agent.pt and its log
    plot_curves(log, curves, f"{TASK}, stage 3: agent and SRM ({branch} branch), seed {SEED}")
    print("first and last episode: foreground rate "
          f"{log[0]['foreground_rate']:.3f} and {log[-1]['foreground_rate']:.3f}, IoU of the "
          f"training samples {log[0]['training_iou']:.3f} and {log[-1]['training_iou']:.3f}")
    script.goodbye([path, log_path, curves], script.command("04_evaluate.py", globals(), ("SAM",)))


if __name__ == "__main__":
    script.run(main, globals())
