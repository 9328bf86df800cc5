"""Solutions to the exercises of 07_ask_image_reward.ipynb; each takes the place of the stub that raises there."""


# %% Exercise 1
# How often A (score 1.2) beats B (0.2), and how often if all scores were divided by 0.5.
def chances():
    return 0.731, 0.881  # σ(1) and σ(2)


# %% Exercise 2
# The gradient of the softened cap, mean log(1 + exp(2 - r)).
def soft_gradient(r):
    return -torch.sigmoid(2 - r) / len(r)


# %% Exercise 3
# First and last column of a 100×300 panorama that ImageReward sees.
def columns_seen():
    return 100, 199  # (672 - 224) / 2 = 224 to 447 of 672, that is a third of it
