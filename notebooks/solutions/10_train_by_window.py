"""Solutions to the exercises of 10_train_by_window.ipynb; each takes the place of the stub that raises there."""


# %% Exercise 1
# After how many iterations an average with decay d has forgotten half of an old weight.
def half_life(d):
    return np.log(0.5) / np.log(d)  # d to this power is a half


# %% Exercise 2
# Structure and reward window, as (first, last) step, of any list of timesteps.
def two_windows(timesteps):
    inside = [[st for st, t in enumerate(timesteps, 1) if a <= t <= b] for a, b in ((600, 1000), (0, 200))]
    return [(steps[0], steps[-1]) for steps in inside]


# %% Exercise 3
# The loss at step `st` if both windows cover every step, without a style loss.
def loss_everywhere(student, st, lr, gt, prompts, noise):
    condition = student.condition(lr, prompts)
    z, t = roll_out(student, condition, st, noise)
    image = estimate(student, z, t, condition)
    structure = LAMBDA["structure"] * (LL(image) - LL(gt)).abs().mean()
    image = image.clamp(0, 1)
    scores = LAMBDA["iqa"] * iqa.score(image) + LAMBDA["preference"] * preference.score(image, prompts)
    return structure - scores.mean()
