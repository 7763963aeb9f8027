"""``python -m sama_experiments``: the programs of this package, one a line."""

PROGRAMS = {
    "noisy_finetuning": "finetune a transformer on noisy labels with learned data weights and labels (section 4.1)",
    "own_data": "the user's own data: learned weights, suspected label errors, pruning (also: sama-kernels)",
    "continued_pretraining": "pretraining text beside a downstream task, its weights learned (section 4.2)",
    "biased_regression": "SAMA's meta gradient against the exact one and CG, Neumann, Nystroem (appendix E)",
    "data_pruning": "prune training images by importance weights that SAMA learns (section 4.3)",
    "few_shot": "a learned initialisation for 20-way few-shot tasks, for several widths of the network (appendix D)",
}


def main() -> None:
    """Print the name and the purpose of every program."""
    print("Programs (python -m sama_experiments.NAME --help tells more):")
    for name, purpose in PROGRAMS.items():
        print(f"  {name:<21} {purpose}")


if __name__ == "__main__":
    main()
