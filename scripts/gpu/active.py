"""Samples how much of the multiprocessors is active, by NVML's GPU performance monitoring, until a process ends."""

import json
import os
import sys
import time

import pynvml as nvml


def runs(process):
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def main():
    process = int(sys.argv[1])
    nvml.nvmlInit()
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    if not nvml.nvmlGpmQueryDeviceSupport(gpu).isSupportedDevice:
        sys.exit("this GPU has no performance monitoring")
    before, after = nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()
    names = {"sm_active_percent": nvml.NVML_GPM_METRIC_SM_UTIL, "pcie_receive_mib_s": nvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC,
             "pcie_send_mib_s": nvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC}
    samples = []
    while runs(process):
        nvml.nvmlGpmSampleGet(gpu, before)
        time.sleep(0.15)
        nvml.nvmlGpmSampleGet(gpu, after)
        metrics = nvml.c_nvmlGpmMetricsGet_t()
        metrics.version = nvml.NVML_GPM_METRICS_GET_VERSION
        metrics.numMetrics = len(names)
        metrics.sample1, metrics.sample2 = before, after
        for place, metric in enumerate(names.values()):
            metrics.metrics[place].metricId = metric
        nvml.nvmlGpmMetricsGet(metrics)
        samples.append({name: round(metrics.metrics[place].value, 3) for place, name in enumerate(names)})
    active = [sample["sm_active_percent"] for sample in samples]
    print(json.dumps({"samples": samples, "most_sm_active_percent": max(active, default=None)}))


if __name__ == "__main__":
    main()
