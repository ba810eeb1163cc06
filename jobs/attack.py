"""Attack a bundle on a Ray cluster: the job that `ray job submit` runs.

    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/attack.py /shared/runs/first/bundle --storage /shared/runs

Everything after `jobs/attack.py` is what `raypp attack` takes. Attacks spread over the cluster that it is submitted to; give
the bundle and --storage as something that every node sees, because each job runs in a separate folder.
"""  # noqa: E501 (the command stands on one line, to be copied)

from raypp.cli.main import main

if __name__ == "__main__":
    import sys

    main(["attack", *sys.argv[1:]])
