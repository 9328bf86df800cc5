"""Solutions to the exercises of 09_ablate_and_doubt.ipynb; each takes the place of the stub that raises there."""


# %% Exercise 1
# The chance that four runs without any effect agree in sign.
def four_signs():
    return 2 * 0.5**4  # all up, or all down


# %% Exercise 2
# Rows of Table 4 with all four no-reference scores above Gram-KL's and a worse LPIPS.
def suspicious():
    table = paper["4 · style loss"]
    above = (table[COLUMNS[1:]] > table.loc["ours", COLUMNS[1:]]).all(axis=1)
    return list(table.index[above & (table["LPIPS"] > table["LPIPS"]["ours"])])


# %% Exercise 3
# Holm's method: which p-values are accepted, in the order given.
def holm(p):
    accepted = [False] * len(p)
    for place, k in enumerate(np.argsort(p)):
        if p[k] > 0.05 / (len(p) - place):
            break
        accepted[k] = True
    return accepted
