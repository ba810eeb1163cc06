"""Deploy a classifier on the Ray cluster that runs this job; the service stays after the job.

    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/serve.py /shared/models

Everything after `jobs/serve.py` is what `raypp serve` takes: a bundle, a run, a search or a model repository that every
node sees, --host, --port and --token-file. `serve status` shows the service, `serve shutdown` ends it.
"""

from raypp.cli.main import main

if __name__ == "__main__":
    import sys

    main(["serve", "--detach", *sys.argv[1:]])
