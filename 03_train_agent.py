"""Stage 3: the PPO agent, trained from the cache with live SAM decoder calls (paper, Algorithm 1).

    python 03_train_agent.py [NAME=value ...]           NAME is any constant below; `help` lists them

An episode prompts all training samples side by side for T rounds; then K epochs of PPO. The SRM goes on learning during
the roll-out. States are never stored: a roll-out keeps masks, and s_t = F * M is rebuilt from them.
"""

import time

import torch
from tqdm import tqdm

from common.agent import (
    LOGIT_SCALE,
    Actor,
    Critic,
    normalise,
    pick,
    policy,
    pool_state,
    ppo_update,
    returns,
)
from common.cache import Cache
from common.episode import Episode, patch_centres, random_pixels, spatial_state
from common.frozen.sam import BatchedPrompter, load_decoder
from common.results.pictures import plot_curves
from common.runtime import checkpoint, files, script, settings
from common.runtime.errors import UserError
from common.srm import CHANNEL_DROP, build_srm, train_step

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
SRM_STEPS = {"implicit": 1, "explicit": 5}  # q: optimiser steps after every action
SRM_BATCH = 8  # samples of the roll-out in one such step; all of them cost over an hour a run on a CPU

# where it goes
RUN_DIR = ""  # empty = runs/<TASK>
FEATURES = ""  # stage 1's cache; empty = features.h5 in the run folder
DEVICE = "auto"  # cuda, mps or cpu; auto takes the first there is


def main() -> None:
    settings.positive(globals(), "EPISODES", "EPOCHS", "ROUNDS", "CLIP_RANGE", "LEARNING_RATE", "SRM_STEPS",
                      "SRM_BATCH")
    if not 0 < GAMMA < 1:
        raise UserError(f"GAMMA={GAMMA} is no discount: set it between 0 and 1")
    settings.not_negative(globals(), "SEED", "SHOTS")
    device = script.device(DEVICE)
    run_dir = script.run_dir(RUN_DIR, TASK)
    features = Cache.open(script.cache_path(FEATURES, run_dir), TASK,
                          script.command("01_cache_features.py", globals()))
    frame, patch = features.attrs["image_size"], features.attrs["patch_size"]
    centres = patch_centres(frame, patch).to(device)
    side = frame // patch
    prompter = BatchedPrompter(load_decoder(features.attrs, device), frame)
    shots = features.training_set(SHOTS, ROUNDS, device)
    embeddings, truth = shots.embeddings, shots.truth  # F, and y on the grid

    # stage 2's SRM goes on learning here; srm.pt itself stays as it is
    srm_path, path = run_dir / "srm.pt", run_dir / "agent.pt"
    stage_2_command = script.command("02_train_srm.py", globals(), ("SHOTS", "SEED"))
    stage_2 = checkpoint.load(srm_path, stage_2_command, **checkpoint.TRAINING)
    checkpoint.require_finished(srm_path, stage_2, stage_2_command)
    settings.require_same(srm_path, stage_2["settings"],
                            {"task": TASK, "shots": SHOTS, "features": features.identity()})
    branch, residual, every_text = (stage_2["settings"][name] for name in ("branch", "residual", "every_text"))
    files.lock(run_dir)

    script.seed_everything(SEED)
    generator = torch.Generator().manual_seed(SEED)
    srm = build_srm(branch, embeddings.shape[1]).to(device)
    checkpoint.restore(srm_path, stage_2, srm=srm)
    actor = Actor(embeddings.shape[1]).to(device)
    critic = Critic(embeddings.shape[1], scale=1 / (1 - GAMMA)).to(device)  # the bound of a return of rewards of 1
    ppo = torch.optim.Adam([*actor.parameters(), *critic.parameters()], LEARNING_RATE)
    srm_optimizer = torch.optim.Adam(srm.parameters(), LEARNING_RATE)
    learning = {"srm": srm, "actor": actor, "critic": critic, "ppo": ppo, "srm_optimizer": srm_optimizer}
    chosen = {"task": TASK, "branch": branch, "seed": SEED, "shots": SHOTS, "episodes": EPISODES, "epochs": EPOCHS,
              "rounds": ROUNDS, "gamma": GAMMA, "clip_range": CLIP_RANGE, "learning_rate": LEARNING_RATE,
              "every_text": every_text, "residual": residual, "srm_steps": SRM_STEPS[branch], "srm_batch": SRM_BATCH,
              "channel_drop": CHANNEL_DROP, "logit_scale": LOGIT_SCALE,
              "features": features.identity(), "srm": checkpoint.fingerprint(stage_2["srm"]),
              "stage_2": {name: stage_2["settings"][name] for name in (
                  "steps", "srm_batch", "learning_rate", "rounds", "states", "channel_drop", "join_kernel")}}
    log, first = [], 1
    if path.exists():  # from where a killed run stopped
        saved = checkpoint.load(path, script.command("03_train_agent.py", globals()), **checkpoint.TRAINING)
        settings.require_same(path, saved["settings"], chosen)
        checkpoint.restore(path, saved, **learning, generator=generator)
        log, first = saved["log"], len(saved["log"]) + 1

    def train_srm(episode: Episode) -> tuple[float, float]:
        """q steps of Eq. 13 on samples of the roll-out as they are now; the last loss and share of cells right."""
        for _ in range(SRM_STEPS[branch]):
            rows = torch.randperm(len(shots.samples), generator=generator)[:SRM_BATCH].to(device)
            maps, y = shots.targets(rows, every_text, generator)
            s_c = episode.semantic_state(rows, maps)
            last = train_step(srm, srm_optimizer, s_c, episode.state(rows), y, generator)
        return last

    for number in tqdm(range(first, EPISODES + 1), "training the agent", initial=first - 1, total=EPISODES):
        started = time.time()

        # Algorithm 1, lines 2 to 4: P_0 is a random pixel of each label, M_0 = D_M(F, P_0)
        episode = Episode(prompter, embeddings, shots.maps, centres, shots.truth_centres != 255, residual)
        srm_log = [train_srm(episode)]  # the state before any mask, from which P_0 comes at test time
        episode.prompt(random_pixels(shots.labels, generator, frame),
                       torch.tensor([[1, 0]]).expand(len(shots.samples), 2))

        # T rounds: choose a patch, label it, ask SAM, collect the reward
        masks, allowed, actions, log_probs, values, rewards, hits, right = [], [], [], [], [], [], [], []
        for _ in range(ROUNDS):
            with torch.no_grad():
                state = episode.action_state()
                distribution = policy(actor(state), episode.allowed)
                action = pick(distribution, generator)  # a_t ~ pi(. | s_t)
                answer = episode.label_by(episode.foreground(srm), action)
                on_target = shots.truth_centres.gather(1, action[:, None])[:, 0] == 1
                values.append(critic(state))
            masks.append(episode.mask)
            allowed.append(episode.allowed)
            actions.append(action)
            log_probs.append(distribution.log_prob(action))
            rewards.append(on_target.float() * 2 - 1)  # +1 on foreground, -1 elsewhere
            hits.append(on_target.float().mean().item())
            right.append((answer == on_target).float().mean().item())
            srm_log.append(train_srm(episode))  # in s_t, where the SRM has just answered
            episode.step(action, answer)  # P_t, M_t

        # Eqs. 6 and 7: returns bootstrapped from s_{T+1} = F * M_T, and advantages
        rewards, values = torch.stack(rewards), torch.stack(values)
        with torch.no_grad():
            targets = returns(rewards, critic(episode.action_state()), GAMMA)
        advantages = normalise(targets - values)

        # Eqs. 8 to 10: K epochs on the states, rebuilt from the masks straight to the action grid
        states = torch.cat([pool_state(spatial_state(embeddings, mask, residual), side) for mask in masks])
        update = ppo_update(actor, critic, ppo, states, torch.cat(actions), torch.cat(allowed), torch.cat(log_probs),
                            targets.flatten(), advantages.flatten(), EPOCHS, CLIP_RANGE)

        final = (episode.mask > 0.5) & (truth >= 0)
        overlap = (final & (truth > 0.5)).sum((1, 2)) / (final | (truth > 0.5)).sum((1, 2)).clamp(min=1)
        srm_losses, srm_accuracies = zip(*srm_log)
        log.append({
            "episode": number, "return": rewards.sum(0).mean().item(),
            "foreground_rate": sum(hits) / len(hits), **update, "label_accuracy": sum(right) / len(right),
            "srm_loss": sum(srm_losses) / len(srm_losses), "srm_accuracy": sum(srm_accuracies) / len(srm_accuracies),
            "training_iou": overlap.mean().item(), "seconds": time.time() - started})
        script.require_finite({name: log[-1][name] for name in ("policy_loss", "value_loss", "srm_loss")},
                                f"in episode {number}")
        checkpoint.save(path, {"settings": chosen, "log": log, "generator": generator.get_state(),
                               "finished": number == EPISODES,
                               **{name: part.state_dict() for name, part in learning.items()}})
        checkpoint.write_log(run_dir / "agent_log.csv", log)

    checkpoint.write_log(run_dir / "agent_log.csv", log)  # also where a kill came between the last episode and its log
    plot_curves(log, run_dir / "agent_curves.png", f"{TASK}, stage 3: agent and SRM ({branch} branch), seed {SEED}")
    print(f"last episode: foreground rate {log[-1]['foreground_rate']:.3f} (first {log[0]['foreground_rate']:.3f}), "
          f"IoU on the training samples, on the embedding grid, {log[-1]['training_iou']:.3f}")
    script.goodbye([path, run_dir / "agent_log.csv", run_dir / "agent_curves.png"],
                     script.command("04_evaluate.py", globals()))


if __name__ == "__main__":
    script.run(main, globals())
