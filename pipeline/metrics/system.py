"""What this node did between two steps, under the names that MLflow gives its own system metrics."""

import time
from collections.abc import Callable

import psutil

MEGA = 1e6


class SystemMeter:
    """Reads the node's counters; each reading is over the time since the one before."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._before: dict[str, float] = {}
        self._then = clock()
        self.read()

    def read(self) -> dict[str, float]:
        """CPU and memory in percent and megabytes, disk and network in megabytes per second; GPUs where NVML is."""
        memory = psutil.virtual_memory()
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": (memory.total - memory.available) / MEGA,
            "system_memory_usage_percentage": memory.percent,
            **self._rates(),
            **_gpus(),
        }

    def _rates(self) -> dict[str, float]:
        """Megabytes per second since the last reading; nothing of what the machine does not count."""
        network, disk = psutil.net_io_counters(), psutil.disk_io_counters()
        counters: dict[str, float] = {}
        if network is not None:
            counters |= {"network_receive": network.bytes_recv, "network_transmit": network.bytes_sent}
        if disk is not None:
            counters |= {"disk_read": disk.read_bytes, "disk_write": disk.write_bytes}
        before, self._before, then, self._then = self._before, counters, self._then, self._clock()
        seconds = max(self._then - then, 1e-9)
        return {
            f"{name}_megabytes_per_second": max(0.0, counters[name] - before[name]) / MEGA / seconds
            for name in counters
            if name in before
        }


def _gpus() -> dict[str, float]:
    """Of every GPU of the node, by NVML; nothing where its library, a driver or a reading is missing."""
    found: dict[str, float] = {}
    try:
        import pynvml

        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(number)
            found[f"gpu_{number}_utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(device).gpu
            found[f"gpu_{number}_memory_usage_megabytes"] = pynvml.nvmlDeviceGetMemoryInfo(device).used / MEGA
            found[f"gpu_{number}_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(device) / 1000
    except Exception:  # each has an error of its own
        return found
    return found
