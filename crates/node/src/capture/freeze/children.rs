//! The children of a stopped process.
//!
//! Owns what their parent has not waited for yet, and who of them was forked since anybody looked. Refuses to tell the parent
//! anything.

use super::Frozen;
use crate::capture::{CaptureError, Surroundings};
use dunlin_proto::ids::Pid;
use dunlin_proto::image::{Child, ChildStop};
use dunlin_sys::procfs::ProcDir;
use dunlin_sys::ptrace::Stopped;
use dunlin_sys::script::{Call, Script};
use std::collections::BTreeMap;
use std::io;

impl Frozen {
    /// Makes its children known: those that it forked since anybody looked stay here, with what they hold.
    pub fn introduce(&self, around: &Surroundings<'_>) -> io::Result<()> {
        child_hosts(&self.source.dir)?
            .into_iter()
            .for_each(|child| around.meet(child));
        Ok(())
    }

    /// Has it children at all? A program with filters of its own is not asked: they may not know the call.
    pub(super) fn ask_for_children(&self, script: &mut Script<'_>) -> Option<Call> {
        const SYS_WAITID: i64 = 247;
        const P_ALL: u64 = 0;
        /// WEXITED, WNOHANG, WNOWAIT, __WALL.
        const ANY: u64 = 4 | 1 | 0x0100_0000 | 0x4000_0000;
        let may = self.source.plan.image.seccomp.is_empty();
        may.then(|| script.attempt("waitid", SYS_WAITID, &[P_ALL, 0, 0, ANY, 0]))
    }

    /// What has the process not waited for yet, of the stops and continuations of its children? If it was asked: what stops
    /// the process by now.
    pub(super) fn ask_of_children(&self, children: &mut [Child]) -> Result<Option<Option<i32>>, CaptureError> {
        const SYS_WAITID: i64 = 247;
        const P_PID: u64 = 1;
        /// WSTOPPED, WCONTINUED, WNOHANG, WNOWAIT.
        const WHICH: u64 = 2 | 8 | 1 | 0x0100_0000;
        const CLD_STOPPED: i32 = 5;
        const CLD_CONTINUED: i32 = 6;
        let mut script = Script::new(&self.source.foothold.arena);
        let mut asked = Vec::new();
        for child in children.iter_mut().filter(|child| child.ended.is_none()) {
            // As many as there is room for: more than a shell has jobs.
            if asked.len() >= 64 {
                break;
            }
            let pid = child.pid.0 as u64;
            let info = script.bytes(&[0; 128]);
            script.attempt("waitid", SYS_WAITID, &[P_PID, pid, info.address, WHICH, 0]);
            asked.push((child, info));
        }
        if asked.is_empty() {
            return Ok(None);
        }
        let (_, answers) = script.run(Stopped::assume(self.source.host))?;
        for (child, info) in asked {
            // si_code; 0 where there is nothing to wait for.
            let news = answers.bytes(info)[8..12].to_vec();
            match &mut child.stop {
                Some(stop) => stop.waitable = news == CLD_STOPPED.to_le_bytes(),
                None => child.continued = news == CLD_CONTINUED.to_le_bytes(),
            }
        }
        Ok(Some(answers.stopped_by()))
    }
}

/// The living and ended children of a process, but for its keepers (which have no say in its life).
pub(super) fn children(dir: &ProcDir, along: &BTreeMap<Pid, bool>) -> Result<Vec<Child>, CaptureError> {
    let mut children = Vec::new();
    for host in child_hosts(dir)? {
        let child = ProcDir::process(host);
        let (Ok(status), Ok(stat)) = (child.status(), child.stat()) else {
            continue;
        };
        // An image's keeper that has ended, and that a daemon which was killed has not had reaped.
        if status.state == 'Z' && stat.exit_signal == 0 {
            continue;
        }
        let last = |v: &[i32]| v.last().copied().map_or(Pid(0), Pid);
        let pid = last(&status.ns_pids);
        let stopped = along.get(&pid).copied().unwrap_or(status.state == 'T');
        children.push(Child {
            pid,
            pgid: last(&status.ns_pgids),
            sid: last(&status.ns_sids),
            along: along.contains_key(&pid),
            continued: false,
            ended: (status.state == 'Z').then_some(stat.exit_code),
            stop: stopped.then_some(ChildStop {
                waitable: false,
                unsaid: false,
                pending: Vec::new(),
            }),
            comm: stat.comm,
        });
    }
    Ok(children)
}

/// The children of a process: their numbers on this machine.
fn child_hosts(dir: &ProcDir) -> io::Result<Vec<i32>> {
    let mut hosts = Vec::new();
    for tid in dir.threads()? {
        let text = dir.text(&format!("task/{tid}/children"))?;
        hosts.extend(text.split_ascii_whitespace().filter_map(|n| n.parse::<i32>().ok()));
    }
    Ok(hosts)
}
