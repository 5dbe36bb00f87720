"""`python -m layerwise` is the same program as the `layerwise` command."""

from layerwise.pipeline.cli import main

if __name__ == "__main__":
    main()
