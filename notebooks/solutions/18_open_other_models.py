"""Solutions to the exercises of 18_open_other_models.ipynb; each takes the place of the stub that raises there."""


# %% Exercise 1
# The σ of a flow model at which the share of noise is `share`.
def flow_sigma(share):
    ratio = (share / (1 - share)) ** 0.5
    return ratio / (1 + ratio)


# %% Exercise 2
# CCSR v2's timesteps: the leap from 999, then a part of the uniform ones.
def leap(uniform, t_max, t_min):
    n = len(uniform)
    return [999, *uniform[n - round(n * t_max) : n - round(n * t_min)]]


# %% Exercise 3
# One step for all families, from z at (α, σ) to z at the following level.
def one_step(kind, z, answer, now, following):
    estimate = estimate_by_hand(kind, *now, z, answer)
    held = (z - now[0] * estimate) / now[1]  # the noise that z holds beside the picture
    return following[0] * estimate + following[1] * held
