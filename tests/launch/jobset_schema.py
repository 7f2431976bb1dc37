"""What a JobSet (jobset.x-k8s.io/v1alpha2) may hold, as JSON schema: the fields that launch/*.yaml use and their kin.

Written down from the published API reference; a field that is not here is refused. The Job inside a replicated job is
checked by the schema of Kubernetes itself (kubernetes-validate).
"""

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_NAME = {"type": "string", "pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$", "maxLength": 63}


def _closed(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_RULE = _closed(
    ["name", "action"],
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons={
        "type": "array",
        "items": {
            "enum": [
                "BackoffLimitExceeded",
                "DeadlineExceeded",
                "FailedIndexes",
                "MaxFailedIndexesExceeded",
                "PodFailurePolicy",
            ]
        },
    },
    targetReplicatedJobs={"type": "array", "items": _TEXT},
)

JOBSET = _closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_closed(
        ["name"],
        name=_NAME,
        annotations={"type": "object", "additionalProperties": _TEXT},
        labels={"type": "object", "additionalProperties": _TEXT},
        namespace=_NAME,
    ),
    spec=_closed(
        ["replicatedJobs"],
        failurePolicy=_closed(
            maxRestarts=_COUNT,
            restartStrategy={"enum": ["Recreate", "BlockingRecreate"]},
            rules={"type": "array", "items": _RULE},
        ),
        successPolicy=_closed(
            ["operator"],
            operator={"enum": ["All", "Any"]},
            targetReplicatedJobs={"type": "array", "items": _TEXT},
        ),
        network=_closed(
            enableDNSHostnames={"type": "boolean"}, publishNotReadyAddresses={"type": "boolean"}, subdomain=_NAME
        ),
        coordinator=_closed(["replicatedJob"], replicatedJob=_TEXT, jobIndex=_COUNT, podIndex=_COUNT),
        suspend={"type": "boolean"},
        ttlSecondsAfterFinished=_COUNT,
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": _closed(
                ["name", "template"],
                name=_NAME,
                replicas=_COUNT,
                template=_closed(["spec"], metadata={"type": "object"}, spec={"type": "object"}),
            ),
        },
    ),
)
