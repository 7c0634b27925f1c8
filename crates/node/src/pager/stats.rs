//! What a space's pager has done, readable from any thread while it works.

use crate::pager::{Finish, Progress, SpaceId};
use dunlin_proto::control::Quantiles;
use dunlin_proto::ids::ImageId;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One space's figures, shared between its pager thread and its handles.
pub(super) struct Shared {
    pub(super) id: SpaceId,
    started: Instant,
    total: u64,
    pub(super) faulted: AtomicU64,
    pub(super) pushed: AtomicU64,
    pub(super) zeroed: AtomicU64,
    pub(super) waits: Histogram,
    status: Mutex<Status>,
    changed: Condvar,
}

/// What changes together.
#[derive(Clone, Default)]
pub(super) struct Status {
    pub(super) pid: Option<i32>,
    pub(super) away: BTreeMap<ImageId, u64>,
    pub(super) attached: bool,
    pub(super) trouble: Option<String>,
    pub(super) finished: Option<(Finish, Duration)>,
}

impl Shared {
    pub(super) fn new(id: SpaceId, pid: Option<i32>, away: &BTreeMap<ImageId, u64>) -> Shared {
        Shared {
            id,
            started: Instant::now(),
            total: away.values().sum(),
            faulted: AtomicU64::new(0),
            pushed: AtomicU64::new(0),
            zeroed: AtomicU64::new(0),
            waits: Histogram::default(),
            status: Mutex::new(Status {
                pid,
                away: away.clone(),
                ..Status::default()
            }),
            changed: Condvar::new(),
        }
    }

    pub(super) fn status(&self) -> MutexGuard<'_, Status> {
        // The status is replaced field by field and never half: a panic elsewhere leaves it readable.
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status());
        self.changed.notify_all();
    }

    pub(super) fn finish(&self, how: Finish) {
        let took = self.started.elapsed();
        self.update(|s| {
            if how != Finish::Withdrawn {
                s.away.clear();
            }
            s.finished.get_or_insert((how, took));
        });
    }

    /// Waits until `done` says so, at most so long; returns its last answer.
    pub(super) fn wait<T>(&self, timeout: Duration, done: impl Fn(&Status) -> Option<T>) -> Option<T> {
        let until = Instant::now().checked_add(timeout);
        let mut status = self.status();
        loop {
            if let Some(answer) = done(&status) {
                return Some(answer);
            }
            let left = until.map_or(Duration::MAX, |u| u.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return None;
            }
            let step = left.min(Duration::from_secs(3600));
            status = self
                .changed
                .wait_timeout(status, step)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    pub(super) fn progress(&self) -> Progress {
        let status = self.status().clone();
        let (faulted, pushed) = (
            self.faulted.load(Ordering::Relaxed),
            self.pushed.load(Ordering::Relaxed),
        );
        let took = status
            .finished
            .as_ref()
            .map_or_else(|| self.started.elapsed(), |(_, took)| *took);
        Progress {
            pages_total: self.total,
            pages_left: status.away.values().sum(),
            pages_faulted: faulted,
            pages_pushed: pushed,
            pages_zeroed: self.zeroed.load(Ordering::Relaxed),
            bytes_per_second: ((faulted + pushed) * 4096) as f64 / took.as_secs_f64().max(1e-6),
            fault_us: self.waits.quantiles_us(),
            elapsed: took,
            attached: status.attached,
            finished: status.finished.map(|(how, _)| how),
            trouble: status.trouble,
        }
    }
}

const SUB_BITS: u32 = 4;
const BUCKETS: usize = 64 << SUB_BITS;

/// Durations, to within 6 %.
pub(super) struct Histogram {
    counts: Box<[AtomicU64; BUCKETS]>,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram {
            counts: Box::new([const { AtomicU64::new(0) }; BUCKETS]),
        }
    }
}

impl Histogram {
    pub(super) fn record(&self, took: Duration) {
        let ns = (took.as_nanos() as u64).max(1 << SUB_BITS);
        let exponent = 63 - ns.leading_zeros();
        let sub = (ns >> (exponent - SUB_BITS)) & ((1 << SUB_BITS) - 1);
        self.counts[((exponent as usize) << SUB_BITS) + sub as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn quantiles_us(&self) -> Quantiles {
        let counts: Vec<u64> = self.counts.iter().map(|c| c.load(Ordering::Relaxed)).collect();
        let total: u64 = counts.iter().sum();
        let quantile = |q: f64| {
            let rank = ((total as f64 * q).ceil() as u64).max(1);
            let mut seen = 0;
            for (i, count) in counts.iter().enumerate() {
                seen += count;
                if seen >= rank {
                    let (exponent, sub) = ((i >> SUB_BITS) as i32, (i & ((1 << SUB_BITS) - 1)) as f64);
                    // The middle of the bucket.
                    return 2f64.powi(exponent) * (1.0 + (sub + 0.5) / f64::from(1 << SUB_BITS)) / 1000.0;
                }
            }
            0.0
        };
        Quantiles {
            p50: quantile(0.5),
            p99: quantile(0.99),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_close() {
        let histogram = Histogram::default();
        assert_eq!(histogram.quantiles_us(), Quantiles::default());
        (1..=1000).for_each(|us| histogram.record(Duration::from_micros(us)));
        let Quantiles { p50, p99 } = histogram.quantiles_us();
        assert!((470.0..530.0).contains(&p50), "{p50}");
        assert!((930.0..1050.0).contains(&p99), "{p99}");
    }
}
