//! Questions about another process that have a system call of their own.
//!
//! Owns kcmp(2), get_robust_list(2), sched_getattr(2), ioprio_get(2) and their setting twins. Refuses to know why one
//! asks. Invariant: asking changes nothing.

use crate::{Errno, check};

/// Rounds an address down to its page.
pub fn page_down(address: u64) -> u64 {
    address & !(crate::script::PAGE - 1)
}

/// Whether two descriptors of two processes are the same open file description. Needs the right to trace both.
///
/// Errors: EBADF when one is not open; EPERM; ENOSYS without CONFIG_KCMP. See kcmp(2).
pub fn same_description(pids: (i32, i32), fds: (i32, i32)) -> Result<bool, Errno> {
    kcmp(pids, KCMP_FILE, (fds.0 as u64, fds.1 as u64)).map(|order| order == 0)
}

/// An order of the two descriptions: 0 same, 1 less, 2 greater; for sorting many.
pub fn description_order(pids: (i32, i32), fds: (i32, i32)) -> Result<i64, Errno> {
    kcmp(pids, KCMP_FILE, (fds.0 as u64, fds.1 as u64))
}

/// Whether a descriptor is the one that an epoll descriptor of the same process watches under a number: several may have
/// been added under one number, which `nth` tells apart. Linear in the size of the set.
///
/// Errors: ENOENT when it watches no more under this number; EBADF. See kcmp(2), KCMP_EPOLL_TFD.
pub fn is_watched_by(process: i32, epoll: i32, watched: i32, nth: u32, candidate: (i32, i32)) -> Result<bool, Errno> {
    let slot = [epoll as u32, watched as u32, nth];
    let index = (candidate.1 as u64, slot.as_ptr() as u64);
    // The kernel reads the slot, which outlives the call.
    kcmp((candidate.0, process), KCMP_EPOLL_TFD, index).map(|order| order == 0)
}

/// Whether two tasks share their address space, descriptor table or file-system context, as CLONE_VM, CLONE_FILES,
/// CLONE_FS make them.
pub fn shares(pids: (i32, i32), what: Sharing) -> Result<bool, Errno> {
    let kind = match what {
        Sharing::Memory => KCMP_VM,
        Sharing::Files => KCMP_FILES,
        Sharing::FileSystem => KCMP_FS,
    };
    kcmp(pids, kind, (0, 0)).map(|order| order == 0)
}

/// What two tasks may share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// The address space.
    Memory,
    /// The descriptor table.
    Files,
    /// Root, working directory, umask.
    FileSystem,
}

const KCMP_FILE: i32 = 0;
const KCMP_VM: i32 = 1;
const KCMP_FILES: i32 = 2;
const KCMP_FS: i32 = 3;
const KCMP_EPOLL_TFD: i32 = 7;

fn kcmp(pids: (i32, i32), kind: i32, indexes: (u64, u64)) -> Result<i64, Errno> {
    // SAFETY: kcmp takes numbers, and of its kinds KCMP_EPOLL_TFD alone reads behind one: a slot that its caller holds.
    check(unsafe { libc::syscall(libc::SYS_kcmp, pids.0, pids.1, kind, indexes.0, indexes.1) })
}

/// A thread's robust list: its head's address and length. See get_robust_list(2).
pub fn robust_list(tid: i32) -> Result<[u64; 2], Errno> {
    let mut head = 0u64;
    let mut length = 0usize;
    // SAFETY: both out-parameters outlive the call.
    check(unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut length) })?;
    Ok([head, length as u64])
}

/// A thread's scheduling: policy, flags, nice value, real-time priority. See sched_getattr(2).
pub fn schedule(tid: i32) -> Result<[i64; 4], Errno> {
    // SAFETY: an all-zero sched_attr is valid.
    let mut attr: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>();
    // SAFETY: `attr` outlives the call and is as long as said.
    check(unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut attr, size, 0) })?;
    Ok([
        i64::from(attr.sched_policy),
        attr.sched_flags as i64,
        i64::from(attr.sched_nice),
        i64::from(attr.sched_priority),
    ])
}

/// Sets a thread's scheduling. EPERM where a higher priority than allowed is asked for. See sched_setattr(2).
pub fn set_schedule(tid: i32, schedule: [i64; 4]) -> Result<(), Errno> {
    // SAFETY: an all-zero sched_attr is valid.
    let mut attr: libc::sched_attr = unsafe { std::mem::zeroed() };
    attr.size = size_of::<libc::sched_attr>() as u32;
    attr.sched_policy = schedule[0] as u32;
    attr.sched_flags = schedule[1] as u64;
    attr.sched_nice = schedule[2] as i32;
    attr.sched_priority = schedule[3] as u32;
    // SAFETY: `attr` outlives the call.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, tid, &raw const attr, 0) }).map(|_| ())
}

/// How long the calling thread is to run in one go while others want its CPU (a hint: 0.1 to 100 ms; Linux 6.12). It gets
/// no more and no less of the CPU than before: with a short slice it comes soon after a wake, with a long one it lets
/// go for whoever wakes. Its policy and niceness stay. See sched_setattr(2).
pub fn set_own_slice(slice: std::time::Duration) -> Result<(), Errno> {
    // SAFETY: an all-zero sched_attr is valid.
    let mut attr: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>();
    // SAFETY: `attr` outlives the call and is as long as said.
    check(unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) })?;
    attr.size = size as u32;
    attr.sched_runtime = slice.as_nanos() as u64;
    // SAFETY: `attr` outlives the call.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) }).map(|_| ())
}

/// Has the calling thread come soon after a wake, also of a clock: for chains of short steps. See [`set_own_slice`], and
/// PR_SET_TIMERSLACK(2const).
pub fn be_prompt() {
    const SHORTEST: std::time::Duration = std::time::Duration::from_micros(100);
    // An older kernel has no slices of one's own; then it comes when it comes.
    let _ = set_own_slice(SHORTEST);
    // SAFETY: numbers only.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1, 0, 0, 0) };
}

/// A thread's I/O priority. See ioprio_get(2).
pub fn io_priority(tid: i32) -> Result<i32, Errno> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: numbers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid) }).map(|v| v as i32)
}

/// Sets it.
pub fn set_io_priority(tid: i32, priority: i32) -> Result<(), Errno> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: numbers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, tid, priority) }).map(|_| ())
}

/// A thread's CPU affinity as the kernel's bit mask, trailing zero bytes cut off. See sched_getaffinity(2).
pub fn affinity(tid: i32) -> Result<Vec<u8>, Errno> {
    let mut mask = vec![0u8; 1024];
    // SAFETY: the kernel writes at most as many bytes as said.
    let length = check(unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, mask.len(), mask.as_mut_ptr()) })?;
    mask.truncate(length as usize);
    while mask.last() == Some(&0) {
        mask.pop();
    }
    Ok(mask)
}

/// Sets a thread's CPU affinity. EINVAL when no CPU of it exists here.
pub fn set_affinity(tid: i32, mask: &[u8]) -> Result<(), Errno> {
    let mut whole = vec![0u8; mask.len().next_multiple_of(8).max(8)];
    whole[..mask.len()].copy_from_slice(mask);
    // SAFETY: the kernel reads as many bytes as said.
    check(unsafe { libc::syscall(libc::SYS_sched_setaffinity, tid, whole.len(), whole.as_ptr()) }).map(|_| ())
}

/// A resource limit of another process: soft, hard. See prlimit(2).
pub fn limit(pid: i32, resource: u32) -> Result<(u64, u64), Errno> {
    let mut limit = libc::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let none: *const libc::rlimit64 = std::ptr::null();
    // SAFETY: `limit` outlives the call; no new limit is given.
    check(unsafe { libc::syscall(libc::SYS_prlimit64, pid, resource, none, &raw mut limit) })?;
    Ok((limit.rlim_cur, limit.rlim_max))
}

/// Sets it. EPERM where the hard limit would be raised without CAP_SYS_RESOURCE.
pub fn set_limit(pid: i32, resource: u32, (soft, hard): (u64, u64)) -> Result<(), Errno> {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    let none: *mut libc::rlimit64 = std::ptr::null_mut();
    // SAFETY: `limit` outlives the call; the old one is not asked for.
    check(unsafe { libc::syscall(libc::SYS_prlimit64, pid, resource, &raw const limit, none) }).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn own_process() {
        let me = std::process::id() as i32;
        let file = std::fs::File::open("/dev/null").unwrap();
        let twin = file.try_clone().unwrap();
        let other = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(
            same_description((me, me), (file.as_raw_fd(), twin.as_raw_fd())),
            Ok(true)
        );
        assert_eq!(
            same_description((me, me), (file.as_raw_fd(), other.as_raw_fd())),
            Ok(false)
        );
        let mask = affinity(0).unwrap();
        set_affinity(0, &mask).unwrap();
        assert!(robust_list(0).unwrap()[1] > 0);
        assert_eq!(schedule(0).unwrap()[0], 0);
        let before = schedule(0).unwrap();
        set_own_slice(std::time::Duration::from_micros(100)).unwrap();
        assert_eq!(schedule(0).unwrap(), before, "only the slice has changed");
        let limits = limit(0, libc::RLIMIT_NOFILE).unwrap();
        set_limit(0, libc::RLIMIT_NOFILE, limits).unwrap();
    }
}
