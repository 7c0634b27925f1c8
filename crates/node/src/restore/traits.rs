//! What a restored process may do and how it is run: credentials, limits, directories, personality.
//!
//! Owns the order in which privileges are given up. Invariant: afterwards the process has exactly what the captured one
//! had; anything else is an error (never more, and never silently less).

use super::blank::install;
use super::{Blank, During, Kit, RestoreError};
use crate::install::Wanted;
use crate::obstacle::obstacle;
use dunlin_proto::image::{Essence, Traits};
use dunlin_sys::procfs::{ProcDir, limits};
use dunlin_sys::script::Script;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const SYS_FCHDIR: i64 = 81;
const SYS_UMASK: i64 = 95;
const SYS_CAPSET: i64 = 126;
const SYS_SETGROUPS: i64 = 116;
const SYS_SETRESUID: i64 = 117;
const SYS_SETRESGID: i64 = 119;
const SYS_SETFSUID: i64 = 122;
const SYS_SETFSGID: i64 = 123;
const SYS_PERSONALITY: i64 = 135;
const SYS_PRCTL: i64 = 157;
const SYS_CHROOT: i64 = 161;
const SYS_PRLIMIT: i64 = 302;
const SYS_SECCOMP: i64 = 317;
const SYS_CLOSE: i64 = 3;
const PR_SET_DUMPABLE: u64 = 4;
const PR_SET_KEEPCAPS: u64 = 8;
const PR_CAPBSET_DROP: u64 = 24;
const PR_GET_SECUREBITS: u64 = 27;
const PR_SET_SECUREBITS: u64 = 28;
const PR_SET_CHILD_SUBREAPER: u64 = 36;
const PR_SET_NO_NEW_PRIVS: u64 = 38;
const PR_SET_THP_DISABLE: u64 = 41;
const PR_CAP_AMBIENT: u64 = 47;
const PR_CAP_AMBIENT_CLEAR_ALL: u64 = 4;

/// Sets everything, credentials last. The blank has one thread: credentials are inherited by those made after.
pub fn set(blank: &Blank, traits: &Traits, seccomp: &[Vec<u8>], kit: &mut Kit<'_>) -> Result<(), RestoreError> {
    set_directories(blank, traits, kit)?;
    let mut script = Script::new(&blank.foothold.arena);
    script.call("umask", SYS_UMASK, &[u64::from(traits.umask)]);
    script.call("personality", SYS_PERSONALITY, &[u64::from(traits.personality)]);
    script.call(
        "prctl",
        SYS_PRCTL,
        &[PR_SET_CHILD_SUBREAPER, u64::from(traits.subreaper), 0, 0, 0],
    );
    script.call(
        "prctl",
        SYS_PRCTL,
        &[PR_SET_THP_DISABLE, u64::from(traits.thp_disable), 0, 0, 0],
    );
    // Before the credentials: afterwards a limit can only be lowered.
    add_limits(blank, &mut script, traits)?;
    let permitted = ProcDir::process(blank.host)
        .status()
        .during(blank.pid, "reading its status")?
        .capabilities[1];
    add_credentials(&mut script, traits, permitted);
    blank.run(blank.host, script, "setting credentials")?;
    verify_limits(blank, traits)?;
    let mut script = Script::new(&blank.foothold.arena);
    if traits.no_new_privs {
        script.call("prctl", SYS_PRCTL, &[PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0]);
    }
    add_filters(blank, &mut script, seccomp, kit)?;
    // Changing credentials resets it; 2 (suid_dumpable) cannot be asked for and is what a set-id program has anyway.
    if traits.dumpable <= 1 {
        script.call(
            "prctl",
            SYS_PRCTL,
            &[PR_SET_DUMPABLE, u64::from(traits.dumpable), 0, 0, 0],
        );
    }
    let secure = script.attempt("prctl", SYS_PRCTL, &[PR_GET_SECUREBITS, 0, 0, 0, 0]);
    let (_, answers) = script.run(blank.leader()).during(blank.pid, "setting privileges")?;
    let secure = answers.of(secure);
    if secure >= 0 && secure != i64::from(traits.securebits) {
        return Err(RestoreError::Obstacles(vec![obstacle(
            blank.pid,
            "permission",
            format_args!("process {}", blank.pid),
            format!("its secure bits are {secure:#x}, not {:#x}", traits.securebits),
            "give the destination's daemon the capabilities that the process has",
        )]));
    }
    // Best effort: the badness may only be lowered with CAP_SYS_RESOURCE.
    let _ = std::fs::write(
        ProcDir::process(blank.host).path("oom_score_adj"),
        traits.oom_score_adj.to_string(),
    );
    verify(blank, traits)
}

/// Corrects what a program changed between the plan and the freeze.
pub fn correct(blank: &mut Blank, essence: &Essence, kit: &mut Kit<'_>) -> Result<(), RestoreError> {
    let (old, new) = (blank.image.traits.clone(), &essence.traits);
    let same_credentials = old.uids == new.uids
        && old.gids == new.gids
        && old.groups == new.groups
        && old.capabilities == new.capabilities
        && old.securebits == new.securebits
        && old.no_new_privs == new.no_new_privs
        && old.root == new.root;
    if !same_credentials || essence.seccomp != blank.image.seccomp {
        return Err(RestoreError::Unsound {
            pid: blank.pid,
            why: "its credentials changed while the move was prepared; try again",
        });
    }
    let mut script = Script::new(&blank.foothold.arena);
    script.call("umask", SYS_UMASK, &[u64::from(new.umask)]);
    script.call("personality", SYS_PERSONALITY, &[u64::from(new.personality)]);
    script.call(
        "prctl",
        SYS_PRCTL,
        &[PR_SET_CHILD_SUBREAPER, u64::from(new.subreaper), 0, 0, 0],
    );
    script.call(
        "prctl",
        SYS_PRCTL,
        &[PR_SET_THP_DISABLE, u64::from(new.thp_disable), 0, 0, 0],
    );
    if new.dumpable <= 1 {
        script.call("prctl", SYS_PRCTL, &[PR_SET_DUMPABLE, u64::from(new.dumpable), 0, 0, 0]);
    }
    add_limits(blank, &mut script, new)?;
    blank.run(blank.host, script, "correcting traits")?;
    verify_limits(blank, new)?;
    if old.cwd != new.cwd {
        set_directories(blank, new, kit)?;
    }
    blank.image.traits = new.clone();
    Ok(())
}

fn set_directories(blank: &Blank, traits: &Traits, kit: &Kit<'_>) -> Result<(), RestoreError> {
    let chroot = (traits.root != b"/").then_some((&traits.root, true));
    for (path, is_root) in chroot.into_iter().chain([(&traits.cwd, false)]) {
        let relative = Path::new(OsStr::from_bytes(path));
        let relative = relative.strip_prefix("/").unwrap_or(relative);
        let relative = if relative.as_os_str().is_empty() {
            Path::new(".")
        } else {
            relative
        };
        // Not O_PATH: such a descriptor cannot be installed in another process.
        let how = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat2(kit.root.as_fd(), relative, how, Mode::empty(), ResolveFlags::IN_ROOT).map_err(|error| {
            RestoreError::Obstacles(vec![obstacle(
                blank.pid,
                "file",
                String::from_utf8_lossy(path),
                format!(
                    "the directory cannot be opened on the destination: {}",
                    std::io::Error::from(error)
                ),
                "make the directory there, or use a shared file system",
            )])
        })?;
        let number = ProcDir::process(blank.host)
            .numbers("fd")
            .during(blank.pid, "reading descriptors")?;
        let number = number.last().map_or(3, |n| n + 1);
        let wanted = Wanted {
            fd,
            number,
            close_on_exec: true,
        };
        install(
            blank.pid,
            blank.pid,
            blank.leader(),
            blank.foothold.syscall_at,
            vec![wanted],
            kit,
        )?;
        let mut script = Script::new(&blank.foothold.arena);
        script.call("fchdir", SYS_FCHDIR, &[number as u64]);
        if is_root {
            let here = script.text(b".");
            script.call("chroot", SYS_CHROOT, &[here.address]);
        }
        script.call("close", SYS_CLOSE, &[number as u64]);
        blank.run(blank.host, script, "entering directories")?;
    }
    Ok(())
}

/// The process sets its limits itself: for another one's prlimit(2) wants CAP_SYS_RESOURCE.
fn add_limits(blank: &Blank, script: &mut Script<'_>, traits: &Traits) -> Result<(), RestoreError> {
    let now = limits_of(blank)?;
    for (resource, (limit, _)) in (0u64..)
        .zip(traits.limits.iter().zip(&now))
        .filter(|(_, (a, b))| a != b)
    {
        let words = script.bytes(&[limit.0, limit.1].map(u64::to_le_bytes).concat());
        script.attempt("prlimit", SYS_PRLIMIT, &[0, resource, words.address, 0]);
    }
    Ok(())
}

fn verify_limits(blank: &Blank, traits: &Traits) -> Result<(), RestoreError> {
    let now = limits_of(blank)?;
    let wrong = (0u64..)
        .zip(traits.limits.iter().zip(&now))
        .filter(|(_, (wanted, has))| wanted != has)
        .map(|(resource, (wanted, has))| {
            obstacle(
                blank.pid,
                "permission",
                format_args!("resource limit {resource}"),
                format!(
                    "it cannot be set to {}:{} on the destination, where it is {}:{}",
                    wanted.0, wanted.1, has.0, has.1
                ),
                "give the daemon CAP_SYS_RESOURCE, or start it with higher limits",
            )
        })
        .collect::<Vec<_>>();
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(RestoreError::Obstacles(wrong))
    }
}

fn limits_of(blank: &Blank) -> Result<Vec<(u64, u64)>, RestoreError> {
    let text = ProcDir::process(blank.host)
        .text("limits")
        .during(blank.pid, "reading limits")?;
    limits::parse(&text).during(blank.pid, "reading limits")
}

fn add_credentials(script: &mut Script<'_>, traits: &Traits, has: u64) {
    const KEEP_CAPS: u32 = 1 << 4;
    let [inheritable, permitted, effective, bounding, ambient] = traits.capabilities;
    script.attempt("prctl", SYS_PRCTL, &[PR_SET_KEEPCAPS, 1, 0, 0, 0]);
    for capability in (0..64).filter(|c| bounding & (1 << c) == 0) {
        // EINVAL past the last capability that the kernel knows.
        script.attempt("prctl", SYS_PRCTL, &[PR_CAPBSET_DROP, capability, 0, 0, 0]);
    }
    let groups: Vec<u8> = traits.groups.iter().flat_map(|g| g.to_le_bytes()).collect();
    let groups = script.bytes(&groups);
    let [ruid, euid, suid, fsuid] = traits.uids.map(u64::from);
    let [rgid, egid, sgid, fsgid] = traits.gids.map(u64::from);
    // An entry that has the right credentials already, and may not change them, fails here: verified below.
    script.attempt(
        "setgroups",
        SYS_SETGROUPS,
        &[traits.groups.len() as u64, groups.address],
    );
    script.attempt("setresgid", SYS_SETRESGID, &[rgid, egid, sgid]);
    script.attempt("setresuid", SYS_SETRESUID, &[ruid, euid, suid]);
    script.attempt("setfsgid", SYS_SETFSGID, &[fsgid]);
    script.attempt("setfsuid", SYS_SETFSUID, &[fsuid]);
    let header = script.bytes(&[0x2008_0522u32.to_le_bytes(), [0; 4]].concat());
    let sets = |sets: [u64; 3]| -> Vec<u8> {
        let halves = |shift: u32| sets.map(|set| ((set >> shift) as u32).to_le_bytes());
        [halves(0), halves(32)].concat().concat()
    };
    // A change from root to another user clears the effective set, and the secure bits need CAP_SETPCAP.
    let all = script.bytes(&sets([has, has, inheritable]));
    script.attempt("capset", SYS_CAPSET, &[header.address, all.address]);
    let data = script.bytes(&sets([effective, permitted, inheritable]));
    script.attempt(
        "prctl",
        SYS_PRCTL,
        &[PR_SET_SECUREBITS, u64::from(traits.securebits), 0, 0, 0],
    );
    // This one is anybody's to change; it was set above.
    let keeps = u64::from(traits.securebits & KEEP_CAPS != 0);
    script.attempt("prctl", SYS_PRCTL, &[PR_SET_KEEPCAPS, keeps, 0, 0, 0]);
    script.attempt("capset", SYS_CAPSET, &[header.address, data.address]);
    // An entry may have more of them than the process had.
    script.attempt("prctl", SYS_PRCTL, &[PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0]);
    for capability in (0..64).filter(|c| ambient & (1 << c) != 0) {
        const RAISE: u64 = 2;
        script.attempt("prctl", SYS_PRCTL, &[PR_CAP_AMBIENT, RAISE, capability, 0, 0]);
    }
}

/// Installs the program's own filters that the blank does not have yet (an entry that was the process has some).
fn add_filters(blank: &Blank, script: &mut Script<'_>, seccomp: &[Vec<u8>], kit: &Kit<'_>) -> Result<(), RestoreError> {
    const SECCOMP_SET_MODE_FILTER: u64 = 1;
    let status = ProcDir::process(blank.host)
        .status()
        .during(blank.pid, "reading its status")?;
    let has = (status.seccomp_filters.unwrap_or(0) as usize).saturating_sub(kit.nest_filters);
    for filter in seccomp.iter().skip(has) {
        let code = script.bytes(filter);
        let mut program = ((filter.len() / 8) as u64).to_le_bytes().to_vec();
        program.extend(code.address.to_le_bytes());
        let program = script.bytes(&program);
        script.call("seccomp", SYS_SECCOMP, &[SECCOMP_SET_MODE_FILTER, 0, program.address]);
    }
    Ok(())
}

fn verify(blank: &Blank, traits: &Traits) -> Result<(), RestoreError> {
    let status = ProcDir::process(blank.host)
        .status()
        .during(blank.pid, "reading its status")?;
    let mut groups = (status.groups.clone(), traits.groups.clone());
    groups.0.sort_unstable();
    groups.1.sort_unstable();
    let wrong = if status.uids != traits.uids || status.gids != traits.gids || groups.0 != groups.1 {
        Some(format!(
            "users {:?}, groups {:?} cannot be given to it (it has {:?}, {:?})",
            traits.uids, traits.gids, status.uids, status.gids
        ))
    } else if status.capabilities != traits.capabilities {
        Some(format!(
            "capabilities {:x?} cannot be given to it (it has {:x?})",
            traits.capabilities, status.capabilities
        ))
    } else if status.no_new_privs != traits.no_new_privs {
        Some("no_new_privs cannot be set".to_owned())
    } else {
        None
    };
    match wrong {
        None => Ok(()),
        Some(why) => Err(RestoreError::Obstacles(vec![obstacle(
            blank.pid,
            "permission",
            format_args!("process {}", blank.pid),
            why,
            "give the destination's daemon the capabilities that the process has",
        )])),
    }
}
