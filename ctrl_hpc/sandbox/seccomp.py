"""The system calls that no program in a jail may make, as a Kafel policy for nsjail.

A denylist: everything that reaches other processes, the kernel's configuration, namespaces, mounts, networks or shared
objects that would outlive the program fails with EPERM, so that a program sees an ordinary error. ``clone3`` fails with
ENOSYS, upon which the C library falls back to ``clone``, whose flags can be inspected.
"""

from __future__ import annotations

import platform

_EPERM, _ENOSYS = 1, 38
_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}
_PR_DENIED = (1, 4, 22, 0x59616D61)  # PDEATHSIG, DUMPABLE, SECCOMP, PTRACER

_DENIED = """
    socket bind connect listen accept accept4 mount umount pivot_root chroot
    ptrace process_vm_readv process_vm_writev kcmp unshare setns
    bpf perf_event_open userfaultfd keyctl add_key request_key
    shmget shmat shmctl shmdt semget semop semtimedop semctl msgget msgsnd msgrcv msgctl
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr
    memfd_create seccomp kexec_load init_module finit_module delete_module
    swapon swapoff reboot acct quotactl name_to_handle_at open_by_handle_at fanotify_init fanotify_mark
    lookup_dcookie personality setpriority ioprio_set sched_setaffinity sched_setscheduler sched_setparam sched_setattr
    settimeofday clock_settime clock_adjtime adjtimex syslog vhangup sethostname setdomainname
    migrate_pages move_pages mbind set_mempolicy setxattr lsetxattr fsetxattr vmsplice nfsservctl
    inotify_init1 inotify_add_watch
""".split()
_DENIED_X86 = "kexec_file_load iopl ioperm modify_ldt uselib ustat sysfs inotify_init".split()
# By number (the same on every architecture since 424), as Kafel's tables may be older than the kernel:
_DENIED_NUMBERS = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "quotactl_fd": 443, "memfd_secret": 447,
    "process_mrelease": 448, "set_mempolicy_home_node": 450,
}  # fmt: skip
_CLONE3 = 435


def policy() -> str:
    """The Kafel text of the policy for this machine's architecture."""
    denied = list(_DENIED)
    if platform.machine() == "x86_64":
        denied += _DENIED_X86
    denied += [f"SYSCALL[{number}]" for number in _DENIED_NUMBERS.values()]
    denied.append(f"clone(flags) {{ flags & {_NAMESPACE_FLAGS:#x} != 0 }}")
    denied.append("prlimit64(pid) { pid != 0 }")
    denied.append("socketpair(family) { family != 1 }")
    denied.append(f"prctl(option) {{ {' || '.join(f'option == {option}' for option in _PR_DENIED)} }}")
    return (
        f"POLICY jail {{ ERRNO({_EPERM}) {{ {', '.join(denied)} }}, ERRNO({_ENOSYS}) {{ SYSCALL[{_CLONE3}] }} }} "
        "USE jail DEFAULT ALLOW"
    )
