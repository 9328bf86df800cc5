"""Solutions to the exercises of 12_measure_the_doubt.ipynb; each takes the place of the stub that raises there."""


# %% Exercise 1
# The chance that four runs without any effect agree in sign.
def four_signs():
    return 2 * 0.5**4  # all up, or all down


# %% Exercise 2
# From how many pairs on the interval of a share p excludes 0.
def pairs_needed(p):
    return (1.96 / math.log(p / (1 - p))) ** 2 * (1 / p + 1 / (1 - p))


# %% Exercise 3
# Holm's method: which p-values are accepted, in the order given.
def holm(p):
    accepted = [False] * len(p)
    for place, k in enumerate(np.argsort(p)):
        if p[k] > 0.05 / (len(p) - place):
            break
        accepted[k] = True
    return accepted
