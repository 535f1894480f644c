# what only pods of this namespace may read
kubectl --namespace=default apply --server-side --force-conflicts -f - <<'END'
{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "ppo1-env", "namespace": "default"}, "stringData": {"HF_TOKEN": "***"}}
END

# the job
kubectl --namespace=default create -f - <<'END'
{
  "apiVersion": "jobset.x-k8s.io/v1alpha2",
  "kind": "JobSet",
  "metadata": {
    "name": "ppo1",
    "namespace": "default",
    "annotations": {
      "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
  },
  "spec": {
    "failurePolicy": {
      "maxRestarts": 3,
      "restartStrategy": "BlockingRecreate",
      "rules": [
        {
          "name": "NeverAgain",
          "action": "FailJobSet",
          "onJobFailureMessagePatterns": [
            "rule at index 0$"
          ],
          "onJobFailureReasons": [
            "PodFailurePolicy"
          ]
        },
        {
          "name": "Preempted",
          "action": "RestartJobSetAndIgnoreMaxRestarts",
          "onJobFailureReasons": [
            "PodFailurePolicy"
          ]
        }
      ]
    },
    "replicatedJobs": [
      {
        "name": "slice",
        "replicas": 1,
        "template": {
          "spec": {
            "parallelism": 32,
            "completions": 32,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podFailurePolicy": {
              "rules": [
                {
                  "action": "FailJob",
                  "onExitCodes": {
                    "containerName": "job",
                    "operator": "In",
                    "values": [
                      2,
                      3
                    ]
                  }
                },
                {
                  "action": "FailJob",
                  "onExitCodes": {
                    "containerName": "job",
                    "operator": "In",
                    "values": [
                      42
                    ]
                  }
                },
                {
                  "action": "FailJob",
                  "onPodConditions": [
                    {
                      "type": "DisruptionTarget"
                    }
                  ]
                }
              ]
            },
            "template": {
              "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 300,
                "nodeSelector": {
                  "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
                  "cloud.google.com/gke-tpu-topology": "4x4x8",
                  "cloud.google.com/gke-spot": "true"
                },
                "tolerations": [
                  {
                    "key": "cloud.google.com/gke-spot",
                    "operator": "Equal",
                    "value": "true",
                    "effect": "NoSchedule"
                  }
                ],
                "containers": [
                  {
                    "name": "job",
                    "image": "us-docker.pkg.dev/my-project/jaxlm/jaxlm:1",
                    "command": [
                      "python",
                      "-m",
                      "launch.train",
                      "--experiment=ppo_tiny",
                      "--set=mesh.fsdp=none",
                      "--set=parent=gs://mine/sft",
                      "--workdir=gs://mine/ppo1"
                    ],
                    "env": [
                      {
                        "name": "TAG",
                        "value": "first try"
                      },
                      {
                        "name": "HF_TOKEN",
                        "valueFrom": {
                          "secretKeyRef": {
                            "name": "ppo1-env",
                            "key": "HF_TOKEN"
                          }
                        }
                      }
                    ],
                    "resources": {
                      "limits": {
                        "google.com/tpu": 4
                      }
                    },
                    "securityContext": {
                      "privileged": true
                    },
                    "volumeMounts": [
                      {
                        "name": "shm",
                        "mountPath": "/dev/shm"
                      }
                    ]
                  }
                ],
                "volumes": [
                  {
                    "name": "shm",
                    "emptyDir": {
                      "medium": "Memory"
                    }
                  }
                ]
              }
            }
          }
        }
      }
    ]
  }
}
END
