"""`python -m sama_kernels`: print `info()`."""

from __future__ import annotations

from sama_kernels.info import info


def main() -> None:
    """Print what this installation is and what it would use."""
    facts = info()
    build = facts["build"]
    print(f"sama_kernels {facts['version']}, torch {facts['torch']}")
    architectures = f" ({', '.join(build['cuda_arch_list'])})" if build["cuda"] else ""
    print(f"build: CPU {'yes' if build['cpu'] else 'no'}, CUDA {'yes' if build['cuda'] else 'no'}{architectures}")
    print(f"optimizers with an adaptation: {', '.join(facts['optimizers'])}")
    for op, choices in facts["ops"].items():
        for device, choice in choices.items():
            print(f"  {op:<20} {device:<5} {choice['backend']:<10} {choice['why']}")


if __name__ == "__main__":
    main()
