//! The session that a client goes on with when its connection breaks.

use std::time::Duration;

use parlour_core::wire::{self, Hello, Welcome};
use parlour_core::{ByteString, Credit, Windows, WrongCount};

use crate::{Error, ErrorKind};

/// How much may be unacknowledged each way, unless the host wants less.
const CREDIT: Credit = Credit { messages: 4096, bytes: 8 * 1024 * 1024 };

/// A session, across connections.
#[derive(Debug)]
pub(crate) struct Kept {
    name: ByteString,
    pub(crate) windows: Windows,
    /// For how long after a connection is lost the host keeps the session.
    pub(crate) grace: Duration,
}

impl Kept {
    /// The session that `welcome` begins; `None` if that ends with its connection.
    pub(crate) fn begin(welcome: &Welcome) -> Option<Self> {
        let (name, windows) = (welcome.session.clone()?, Windows::new(welcome.credit));
        Some(Self { name, windows, grace: welcome.grace })
    }

    /// Asks in `hello` for a session, and for `earlier` if there is one.
    pub(crate) fn ask(hello: &mut Hello, earlier: Option<&Self>) {
        hello.features = [wire::RESUME, wire::DELIVERIES].map(ByteString::from_static).into();
        hello.credit = CREDIT;
        if let Some(earlier) = earlier {
            hello.session = Some(earlier.name.clone());
            hello.received = earlier.windows.received();
        }
    }
}

pub(crate) fn wrong_count(error: WrongCount) -> Error {
    Error::new(ErrorKind::Protocol, "the host lost count of the session's frames")
        .with_source(error)
}
