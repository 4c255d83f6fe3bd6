"""The restricted profile of the Pod Security Standards, as Kubernetes 1.37 documents it, for Linux pods.

https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted; each check has its heading there.
"""

from collections.abc import Iterator
from typing import Any

from tests.chart.objects import Pod

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SECCOMP = {"RuntimeDefault", "Localhost"}
APP_ARMOR = {"RuntimeDefault", "Localhost"}
SELINUX = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
}


def violations(pod: Pod) -> Iterator[str]:
    """Why the API server would refuse the pod in a namespace that enforces `restricted`; none when it would not."""
    yield from _of_pod(pod.spec)
    context = pod.spec.get("securityContext") or {}
    for container in pod.containers:
        own = container.get("securityContext") or {}
        for problem in (*_of_container(own, context), *_of_ports(container)):
            yield f"{container['name']}: {problem}"


def _of_pod(spec: dict[str, Any]) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield f"Host Namespaces: {field}"
    for volume in spec.get("volumes") or []:
        if kinds := set(volume) - {"name"} - VOLUMES:
            yield f"Volume Types: {volume['name']} is {', '.join(kinds)}"
    for one in (spec.get("securityContext") or {}).get("sysctls") or []:
        if one["name"] not in SYSCTLS:
            yield f"Sysctls: {one['name']}"
    yield from _of_any(spec.get("securityContext") or {})


def _of_container(own: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    capabilities = own.get("capabilities") or {}
    if own.get("privileged"):
        yield "Privileged Containers"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "Privilege Escalation: allowPrivilegeEscalation is not false"
    if "ALL" not in (capabilities.get("drop") or []):
        yield "Capabilities: ALL are not dropped"
    if set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
        yield f"Capabilities: {capabilities['add']} are added"
    if own.get("procMount", "Default") != "Default":
        yield "/proc Mount Type"
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "Running as Non-root: runAsNonRoot is not true"
    if (own.get("seccompProfile") or pod.get("seccompProfile") or {}).get("type") not in SECCOMP:
        yield "Seccomp: neither RuntimeDefault nor Localhost"
    yield from _of_any(own)


def _of_any(context: dict[str, Any]) -> Iterator[str]:
    """What a pod's and a container's security context are judged alike by."""
    selinux = context.get("seLinuxOptions") or {}
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield "HostProcess"
    if context.get("runAsUser") == 0:
        yield "Running as Non-root user: runAsUser is 0"
    if (context.get("appArmorProfile") or {}).get("type", "RuntimeDefault") not in APP_ARMOR:
        yield "AppArmor"
    if selinux.get("type") not in SELINUX or selinux.get("user") or selinux.get("role"):
        yield "SELinux"
    if (context.get("seccompProfile") or {}).get("type", "RuntimeDefault") not in SECCOMP:
        yield "Seccomp: Unconfined"


def _of_ports(container: dict[str, Any]) -> Iterator[str]:
    for port in container.get("ports") or []:
        if port.get("hostPort"):
            yield f"Host Ports: {port['hostPort']}"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        how = container.get(probe) or {}
        if (how.get("httpGet") or {}).get("host") or (how.get("tcpSocket") or {}).get("host"):
            yield f"Host Probes: {probe}"
