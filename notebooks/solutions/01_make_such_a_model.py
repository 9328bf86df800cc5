"""Solutions to the exercises of 01_make_such_a_model.ipynb; each takes the place of the stub that raises there."""


# %% Exercise 1
# The constant β with which σ after `steps` timesteps equals `end`.
def constant_beta(end, steps):
    return 1 - (1 - end**2) ** (1 / steps)  # 1 - σ² = (1 - β)^steps


# %% Exercise 2
# Latents with mean 0 and deviation 1 in every channel.
def standardized(z):
    return (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True)


# %% Exercise 3
# The weight per timestep that makes the squared error in velocity that of the picture.
def weight_of_velocity(bar_t):
    return 1 - bar_t  # σ²: an error δ of the picture is δ/σ in the velocity
