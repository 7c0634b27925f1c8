//! A daemon that dies at a step of a move.

use dunlin_lab::Lab;
use std::sync::mpsc::channel;

/// Does what may end only with the daemon that comes next, while this node's daemon has a fuse; what came of it, and whether
/// the daemon has outlived it. `with_it` is killed when that one dies. Both are started again.
pub fn while_fused<T: Send>(
    lab: &Lab,
    node: &str,
    with_it: Option<&str>,
    work: impl FnOnce() -> T + Send,
) -> (T, bool) {
    let fused = lab.daemon(node);
    std::thread::scope(|scope| {
        // Whichever comes first: the daemon's end, or that of the work.
        let (over, first) = channel();
        let daemon_is = over.clone();
        if let Some(daemon) = fused {
            scope.spawn(move || {
                daemon.until_ended();
                let _ = daemon_is.send(());
            });
        }
        let working = scope.spawn(move || {
            let done = work();
            let _ = over.send(());
            done
        });
        if fused.is_some() {
            first.recv().expect("both tell of their end");
        }
        let survived = fused.is_some_and(|daemon| daemon.is_alive());
        // It may be at its last step just now.
        if let Some(daemon) = fused {
            daemon.kill();
            daemon.until_ended();
        }
        if let Some(other) = with_it {
            lab.signal_daemon(other, 9);
        }
        lab.start_daemons(&with_it.into_iter().chain([node]).collect::<Vec<_>>());
        (working.join().unwrap(), survived)
    })
}
