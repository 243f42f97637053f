use futures_util::future::{BoxFuture, ready};
use parlour_core::Payload;

use crate::{AgentError, FromMessage, IntoReply, Message};

/// Calls a macro with the names of the parts of a handler, once for each number of them.
macro_rules! for_each_arity {
    ($macro:ident) => {
        $macro!();
        $macro!(A);
        $macro!(A B);
        $macro!(A B C);
        $macro!(A B C D);
        $macro!(A B C D E);
        $macro!(A B C D E F);
        $macro!(A B C D E F G);
        $macro!(A B C D E F G H);
    };
}
pub(crate) use for_each_arity;

/// An async function whose arguments are parts of a message.
///
/// Every function and closure of up to eight arguments is one; nothing else has to be. Its arguments
/// implement [`FromMessage`], and what it returns implements [`IntoReply`].
///
/// ```
/// use parlour::{Agent, AgentError, Cx, Json, PayloadExt};
///
/// async fn sum(Json(numbers): Json<Vec<i64>>) -> Json<i64> {
///     Json(numbers.iter().sum())
/// }
/// async fn mean(cx: Cx, Json(numbers): Json<Vec<i64>>) -> Result<Json<i64>, AgentError> {
///     let sum = cx.call("sum", Json(&numbers)).json::<i64>().await?;
///     Ok(Json(sum.checked_div(numbers.len() as i64).ok_or("no numbers")?))
/// }
/// let (sum, mean) = (Agent::stateless().on_call(sum), Agent::stateless().on_call(mean));
/// let upper = Agent::stateless().on_call(async |text: String| text.to_uppercase());
///
/// // A closure that captures something gives each message a share of it.
/// let greeting = std::sync::Arc::new("hello".to_owned());
/// let greeter = Agent::stateless().on_call(move |who: String| {
///     let greeting = greeting.clone();
///     async move { format!("{greeting} {who}") }
/// });
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler",
    label = "not an async function or closure",
    note = "a handler is an async function or closure of up to eight arguments, with their types \
            written out, each of which implements `FromMessage`"
)]
pub trait Handler<Parts>: Send + Sync + 'static {
    /// What the function returns when it is called.
    type Future;

    /// Calls the function.
    fn call(&self, parts: Parts) -> Self::Future;
}

macro_rules! functions {
    ($($part:ident)*) => {
        // Bounds on the arguments and on the future stand where a handler is given to an agent:
        // there the compiler names the one that fails.
        impl<Function, Future, $($part),*> Handler<($($part,)*)> for Function
        where
            Function: Fn($($part),*) -> Future + Send + Sync + 'static,
        {
            type Future = Future;

            #[allow(non_snake_case, reason = "a part is named like its type")]
            fn call(&self, ($($part,)*): ($($part,)*)) -> Future {
                self($($part),*)
            }
        }
    };
}

for_each_arity!(functions);

/// A handler of whatever parts.
pub(crate) type BoxHandler<S> =
    Box<dyn Fn(Message<S>) -> BoxFuture<'static, Result<Payload, AgentError>> + Send + Sync>;

pub(crate) fn boxed<S, H, Parts>(handler: H) -> BoxHandler<S>
where
    S: 'static,
    H: Handler<Parts>,
    Parts: FromMessage<S>,
    H::Future: Future<Output: IntoReply> + Send + 'static,
{
    Box::new(move |message| match Parts::from_message(&message) {
        Ok(parts) => {
            let work = handler.call(parts);
            Box::pin(async move { work.await.into_reply() })
        }
        Err(fault) => Box::pin(ready(Err(fault.into()))),
    })
}
