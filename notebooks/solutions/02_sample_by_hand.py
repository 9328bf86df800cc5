"""Solutions to the exercises of 02_sample_by_hand.ipynb; each takes the place of the stub that raises there."""


# %% Exercise 1
# The sampling step of the mini model that has timestep `t`.
def step_of(t):
    return (1019 - t) // 20  # the inverse of t = 1019 - 20 st


# %% Exercise 2
# The noise that a predicted velocity implies.
def noise_from_velocity(z_t, v, t):
    # z0 = αz - σv in (z - αz0) / σ, with 1 - α² = σ²
    return alpha_bar[t].sqrt() * v + (1 - alpha_bar[t]).sqrt() * z_t


# %% Exercise 3
# A DDIM step in which fresh noise replaces part of the implied noise.
def stochastic_step(z_t, z0, t, eta, fresh):
    implied = (z_t - alpha_bar[t].sqrt() * z0) / (1 - alpha_bar[t]).sqrt()
    before, after = alpha_bar[t], share_after(t)
    s = eta * ((1 - after) / (1 - before)).sqrt() * (1 - before / after).sqrt()
    return after.sqrt() * z0 + (1 - after - s**2).sqrt() * implied + s * fresh
