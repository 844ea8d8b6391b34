"""Runs that are killed at random moments and started again until they end."""

import multiprocessing


class AtStep:
    """A `progress` that sets an event when it has been called for step `step` of the training, or for a later one."""

    def __init__(self, step, event):
        self.step, self.event = step, event

    def __call__(self, stage, done, total, **numbers):
        if stage == "distill" and done >= self.step:
            self.event.set()


def run_killed(target, arguments, final, rng, kills=3, steps=5):
    """target(*arguments, final, progress) in processes, until it writes the file `final`; returns how many were killed.

    The first `kills` of them are killed just after a random one of the first `steps` steps.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.models.mixtral.modeling_mixtral", "moe2dense.distillation.trainer"])
    killed = 0
    for _ in range(kills + 1):
        reached = context.Event()
        progress = AtStep(rng.randint(1, steps), reached)
        process = context.Process(target=target, args=(*arguments, final, progress))
        process.start()
        if kills:
            assert reached.wait(100)
            process.join(rng.uniform(0, 0.02))
            if process.exitcode is None:
                process.kill()
                killed += 1
            kills -= 1
        process.join(100)
        if final.exists():
            break
    return killed
