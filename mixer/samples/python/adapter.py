#!/usr/bin/env python3
"""An adapter for Mixer in Python: turns values away, counts quota, prints metrics.

It serves three of Istio's templates, listentry (check), quota and metric (report). Its parameters come with
each call, so it keeps nothing but its counters. See README.md.
"""

import argparse
import importlib
import pathlib
import sys
import tempfile
import threading
import time
from concurrent import futures

import grpc
from google.protobuf import duration_pb2
from grpc_tools import protoc

HERE = pathlib.Path(__file__).resolve().parent
PROTOS = HERE / "../../../api/protocols/proto"
TEMPLATES = ["listentry", "metric", "quota"]
# google.rpc.Code
PERMISSION_DENIED = 7


def generate(protos):
    """Python modules of the protos, in a folder that modules are looked for in from now on."""
    folder = tempfile.mkdtemp(prefix="adapter-")
    wanted = [f"istio/mixer/template/{name}.proto" for name in TEMPLATES]
    wanted += [
        "istio/mixer/adapter/model/v1beta1/model.proto",
        "istio/mixer/adapter/model/v1beta1/extensions.proto",
        "istio/policy/v1beta1/type.proto",
        "google/rpc/status.proto",
    ]
    own = importlib.resources.files("grpc_tools") / "_proto"  # google/protobuf/*.proto
    status = protoc.main(
        ["protoc", f"-I{protos}", f"-I{HERE}", f"-I{own}"]
        + [f"--python_out={folder}", f"--grpc_python_out={folder}"]
        + wanted
        + ["params.proto"]
    )
    if status != 0:
        sys.exit("the protos do not compile")
    sys.path.insert(0, folder)
    import google

    google.__path__.append(f"{folder}/google")


def value(message):
    """The value in an istio.policy.v1beta1.Value, whatever its type."""
    kind = message.WhichOneof("value")
    found = getattr(message, kind) if kind else None
    return getattr(found, "value", found)


class Adapter:
    """All three services; the names of the methods are those of the protos."""

    def __init__(self, modules):
        self.m = modules
        self.lock = threading.Lock()
        self.counters = {}

    def params(self, request):
        params = self.m.params.Params()
        request.adapter_config.Unpack(params)
        return params

    def HandleListEntry(self, request, context):
        """Check: is the value among those that are turned away?"""
        found = value(request.instance.value)
        result = self.m.model.CheckResult(
            valid_duration=duration_pb2.Duration(seconds=5), valid_use_count=1000
        )
        if found in self.params(request).denied:
            result.status.code = PERMISSION_DENIED
            result.status.message = f"{found} is not welcome"
        return result

    def HandleQuota(self, request, context):
        """Quota: so much per window for each set of dimensions."""
        params = self.params(request)
        length = params.window_seconds or 1
        window = int(time.monotonic() / length)
        dimensions = {name: str(value(v)) for name, v in request.instance.dimensions.items()}
        key = (request.instance.name, tuple(sorted(dimensions.items())))
        answer = self.m.model.QuotaResult()
        for name, wanted in request.quota_request.quotas.items():
            with self.lock:
                start, used = self.counters.get(key, (window, 0))
                used = used if start == window else 0
                left = max(params.limit - used, 0)
                granted = wanted.amount if wanted.amount <= left else 0
                if wanted.best_effort:
                    granted = min(wanted.amount, left)
                self.counters[key] = (window, used + granted)
            answer.quotas[name].granted_amount = granted
            answer.quotas[name].valid_duration.seconds = length
        return answer

    def HandleMetric(self, request, context):
        """Report: a line for each sample."""
        for instance in request.instances:
            labels = {name: value(v) for name, v in sorted(instance.dimensions.items())}
            print(f"{instance.name} {value(instance.value)} {labels}", flush=True)
        return self.m.model.ReportResult()


class Modules:
    """What was generated."""

    def __init__(self):
        self.params = importlib.import_module("params_pb2")
        self.model = importlib.import_module("istio.mixer.adapter.model.v1beta1.model_pb2")
        for name in TEMPLATES:
            setattr(self, name, importlib.import_module(f"istio.mixer.template.{name}_pb2_grpc"))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="127.0.0.1:9070", help="where to listen (port 0: any)")
    parser.add_argument("--protos", default=PROTOS, type=pathlib.Path, help="folder of Istio's protos")
    args = parser.parse_args()
    generate(args.protos)
    modules = Modules()
    adapter = Adapter(modules)
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
    modules.listentry.add_HandleListEntryServiceServicer_to_server(adapter, server)
    modules.quota.add_HandleQuotaServiceServicer_to_server(adapter, server)
    modules.metric.add_HandleMetricServiceServicer_to_server(adapter, server)
    port = server.add_insecure_port(args.address)
    server.start()
    print(f"listening on {args.address.rsplit(':', 1)[0]}:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
