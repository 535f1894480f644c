# ppo1: 2 slices of 8x8 chips, 32 hosts

# the code, as it is committed
git archive --format=tar.gz --prefix=ppo1/ --output=build/ppo1.tar.gz COMMIT

# how they are
gcloud compute tpus queued-resources list '--format=csv[no-heading](name.basename(),state.state)' \
    --project=my-project --zone=us-east5-a --quiet

# the request for machines, which waits until there is capacity
gcloud compute tpus queued-resources create ppo1 --node-count=2 --node-prefix=ppo1 --accelerator-type=v6e-64 \
    --runtime-version=v2-alpha-tpuv6e --async --project=my-project --zone=us-east5-a --quiet

# to every host
gcloud compute tpus tpu-vm scp build/ppo1.tar.gz ppo1-0: --worker=all --project=my-project --zone=us-east5-a \
    --quiet

# to every host
gcloud compute tpus tpu-vm scp build/ppo1.tar.gz ppo1-1: --worker=all --project=my-project --zone=us-east5-a \
    --quiet

# the environment on every host
gcloud compute tpus tpu-vm ssh ppo1-0 --worker=all \
    '--command=tar -xzf ppo1.tar.gz && bash ppo1/launch/worker.sh setup' --project=my-project --zone=us-east5-a \
    --quiet

# the environment on every host
gcloud compute tpus tpu-vm ssh ppo1-1 --worker=all \
    '--command=tar -xzf ppo1.tar.gz && bash ppo1/launch/worker.sh setup' --project=my-project --zone=us-east5-a \
    --quiet

# ==== start it: 32 hosts one by one, eight at a time; this is the first

# the command
gcloud compute tpus tpu-vm ssh ppo1-0 --worker=0 \
    '--command=env '"'"'TAG=first try'"'"' bash ppo1/launch/worker.sh start 699d8933f049 launch.train --experiment=ppo_tiny --set=mesh.fsdp=none --set=parent=gs://mine/sft --workdir=gs://mine/ppo1' \
    --project=my-project --zone=us-east5-a --quiet <<'END'
HF_TOKEN=***
END

# ==== every --poll_seconds, until it has ended on every host

# how they are
gcloud compute tpus queued-resources list '--format=csv[no-heading](name.basename(),state.state)' \
    --project=my-project --zone=us-east5-a --quiet

# how they are
gcloud compute tpus tpu-vm list '--format=csv[no-heading](name.basename(),state)' --project=my-project \
    --zone=us-east5-a --quiet

# how the command is, on every host
gcloud compute tpus tpu-vm ssh ppo1-0 --worker=all \
    '--command=if [ -e ppo1/launch/worker.sh ]; then bash ppo1/launch/worker.sh state; else echo host idle; fi' \
    --project=my-project --zone=us-east5-a --quiet

# how the command is, on every host
gcloud compute tpus tpu-vm ssh ppo1-1 --worker=all \
    '--command=if [ -e ppo1/launch/worker.sh ]; then bash ppo1/launch/worker.sh state; else echo host idle; fi' \
    --project=my-project --zone=us-east5-a --quiet

# ==== when a host has failed, 3 times at most: and then copy and start again

# the last lines of its output
gcloud compute tpus tpu-vm ssh ppo1-0 --worker=all '--command=bash ppo1/launch/worker.sh log 50' \
    --project=my-project --zone=us-east5-a --quiet

# the last lines of its output
gcloud compute tpus tpu-vm ssh ppo1-1 --worker=all '--command=bash ppo1/launch/worker.sh log 50' \
    --project=my-project --zone=us-east5-a --quiet

# ends what still runs
gcloud compute tpus tpu-vm ssh ppo1-0 --worker=all '--command=bash ppo1/launch/worker.sh stop' \
    --project=my-project --zone=us-east5-a --quiet

# ends what still runs
gcloud compute tpus tpu-vm ssh ppo1-1 --worker=all '--command=bash ppo1/launch/worker.sh stop' \
    --project=my-project --zone=us-east5-a --quiet

# ==== when it was preempted, 100 times at most: and then again from the machines on

# the request and its machines
gcloud compute tpus queued-resources delete ppo1 --force --project=my-project --zone=us-east5-a --quiet

# ==== in the end: --keep leaves the machines there
