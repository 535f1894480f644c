# process 0
env JAXLM_COORDINATOR=127.0.0.1:8476 JAXLM_PROCESSES=2 JAXLM_PROCESS=0 JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 \
    python -m launch.train --experiment=pretrain_tiny --workdir=runs/two

# process 1
env JAXLM_COORDINATOR=127.0.0.1:8476 JAXLM_PROCESSES=2 JAXLM_PROCESS=1 JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 \
    python -m launch.train --experiment=pretrain_tiny --workdir=runs/two
