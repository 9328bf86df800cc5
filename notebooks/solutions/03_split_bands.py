"""Solutions to the exercises of 03_split_bands.ipynb; each takes the place of the stub that raises there."""


# %% Exercise 1
# LL of an image that is 0.3 everywhere.
def constant_ll():
    return 4 * 0.3 / 2


# %% Exercise 2
# Remove from a photograph everything finer than LL.
def coarse(x):
    LL = split(x)[0]
    nothing = torch.zeros_like(LL)
    return merge(LL, nothing, nothing, nothing)  # every 2×2 block becomes its mean


# %% Exercise 3
# A change of every pixel by 0.1 that the structure loss cannot see.
def invisible(x):
    # two pixels of every block rise and two fall, so that their sum stays
    checkerboard = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(x.shape[-2] // 2, x.shape[-1] // 2)
    return x + 0.1 * checkerboard
