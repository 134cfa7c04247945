"""``python -m qwenq``, the form that launchers such as torchrun start."""

from qwenq.cli import main

if __name__ == "__main__":
    main()
