"""`python -m mergekit_lite` is `merge`."""

from mergekit_lite.cli.app import main

if __name__ == "__main__":
    main()
